# Everything a newcomer needs: `make demo` and `make test` set themselves up in .venv, and work again without a network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VERSION = $(shell sed -n 's/^__version__.*"\(.*\)"/\1/p' client/keyferry/__init__.py)
PROJECTS := client/pyproject.toml agent/pyproject.toml pyproject.toml
PIN = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-package keyferry --no-emit-package keyferry-agent $(UPGRADE:%=--upgrade) $(PACKAGE:%=--upgrade-package %)
A_WEEK_OLD = $(UPGRADE:%=--exclude-newer "7 days")

# Where bytecode may not be written, each agent of a test would compile what changed since the installation.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-hsm test test-fast test-bare test-hosts check format suite coverage memory bench bench-check fuzz mutants simulate hostile soak records docs wheels image requirements audit \
	test-requirements clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

demo: $(VENV)/.runtime  ## the main job, step by step, with an agent of its own
	@$(BIN)/python docs/demo/main_job.py

demo-hsm: $(VENV)/.tokens  ## the same with a PKCS#11 token: SoftHSM2, in a folder of its own
	@$(BIN)/python docs/demo/hsm.py

test:  ## linters, types, and the whole test suite
	@echo "make test: linters, types, and about 4,300 tests take about 6 minutes on two cores. The first time, the tools are installed before."
	@$(MAKE) --no-print-directory check $(if $(KEYFERRY_NO_SKIPS),coverage,suite)
	@echo "make test passed: $$(cat .cache/counts)"

test-fast: $(VENV)/.development  ## the tests that start no process: more than half of all, in less than a minute
	@echo "make test-fast: more than half of the tests take less than a minute on two cores."
	@echo "It leaves out tests that start a process (agents, most commands), scrypt, CiphertextBlobs, fuzzing, the simulation and Wycheproof."
	$(BIN)/pytest -n auto --dist worksteal --fast

test-bare:  ## (as root) make demo and make test on a Debian with nothing but Python, pip, make and git, as an ordinary user
	.ci/bare

test-hosts: $(VENV)/.hosts  ## (as root) what an operator installs, run for real: units on systemd, pods in podman; minutes
	$(BIN)/pytest -p no:randomly -o faulthandler_timeout=300 tests/system  # a test may build an image or boot a system; some are steps of one story

check: $(VENV)/.development
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python tools/language.py $(BASE)

suite: $(VENV)/.development
	$(BIN)/pytest -n auto --dist worksteal
	@cat .cache/skipped

# Skipped tests cover nothing, and measuring takes two thirds more time: it is for the machine that has everything.
coverage: $(VENV)/.development  ## the whole test suite, and the lines that it covers, with a gate
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n auto --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	@cat .cache/skipped

format: $(VENV)/.development  ## put every file into the project's form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

memory: $(VENV)/.development  ## measure what is in the agent's memory while it works (docs/memory.md)
	PYTHONPATH=tests $(BIN)/python tests/measure_memory.py

bench: $(VENV)/.bench  ## measure speed beside the bare computation, and write docs/performance.md (QUICK=1: fast, and writes no page)
	PYTHONPATH=tests $(BIN)/python -m bench $(if $(QUICK),--quick) $(PART)

bench-check: $(VENV)/.bench  ## fail where a ratio is much worse than the one that is kept
	PYTHONPATH=tests $(BIN)/python -m bench --check

fuzz: $(VENV)/.fuzz  ## fuzz what reads what others wrote (MINUTES=10 in all, TARGET=codec for one; docs/fuzzing.md)
	PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(or $(MINUTES),2) $(TARGET)

mutants: $(VENV)/.mutants  ## plant faults in the security core, which tests have to find (MINUTES=10 in all, MODULE=grants, SEED=1, SAMPLE=3 modules; docs/mutants.md)
	PYTHONPATH=tests $(BIN)/python -m mutants --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) $(if $(SAMPLE),--sample $(SAMPLE)) $(MODULE)

simulate: $(VENV)/.development  ## the whole daemon in simulated time, under faults: SEED=... again, or MINUTES=... of new ones
	PYTHONPATH=tests $(BIN)/python -m simulation $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(FIRST),--first $(FIRST)) $(if $(RUNS),--runs $(RUNS)) $(if $(PROCESSES),--processes $(PROCESSES))

records: $(VENV)/.development  ## measure a rewrap of 100,000 records on SQLite and PostgreSQL (docs/records.md)
	PYTHONPATH=tests $(BIN)/python tests/measure_records.py

hostile: $(VENV)/.development  ## a million invalid requests, a thousand slow peers, and so on, against a running agent: minutes
	KEYFERRY_HOSTILE=1 $(BIN)/pytest -p no:xdist -o faulthandler_timeout=900 tests/test_malformed_messages.py tests/test_abusive_clients.py tests/test_environment_faults.py tests/test_reload.py tests/test_memory.py

soak: $(VENV)/.development  ## clients, an operator and accidents on one agent for MINUTES (60), then simulated lives for as long (docs/soak.md)
	PYTHONPATH=tests $(BIN)/python -m soak --minutes $(or $(MINUTES),60)
	PYTHONPATH=tests $(BIN)/python -m simulation --minutes $(or $(MINUTES),60)

docs: $(VENV)/.development  ## write the generated parts of PROTOCOL.md
	PYTHONPATH=tests $(BIN)/python tools/generate_docs.py

wheels: $(VENV)/.created  ## build both distributions into dist/, with their commit as version, and SHA256SUMS
	@.ci/wheels $(PYTHON) $(VENV) dist

image: wheels  ## build the agent's image with podman (BASE=... for another base than Python's own)
	podman build $(if $(BASE),--build-arg BASE=$(BASE)) --file deploy/Containerfile --tag keyferry-agent:$(VERSION) .

# Each holds the versions of those before it: what is deployed is what is tested.
requirements: $(VENV)/.created  ## write the pinned and hashed requirements (UPGRADE=1: anew; PACKAGE=name: one of them)
	@.ci/pip $(PYTHON) $(VENV) uv==0.13.9
	$(PIN) $(A_WEEK_OLD) agent/pyproject.toml --extra metrics --output-file deploy/requirements.txt
	$(PIN) $(A_WEEK_OLD) client/pyproject.toml --all-extras -c deploy/requirements.txt --output-file deploy/requirements-client.txt
	$(PIN) client/pyproject.toml agent/pyproject.toml --all-extras --group dev -c deploy/requirements.txt \
		-c deploy/requirements-client.txt --output-file .ci/requirements.txt
	$(PIN) --group audit -c .ci/requirements.txt --output-file .ci/requirements-audit.txt
	$(PIN) --group fuzz -c .ci/requirements.txt --output-file .ci/requirements-fuzz.txt
	$(PIN) --group mutants -c .ci/requirements.txt --output-file .ci/requirements-mutants.txt
	$(PIN) --group hosts -c .ci/requirements.txt --output-file .ci/requirements-hosts.txt
	$(PIN) tests/foreign/sdk/requirements.in --output-file tests/foreign/sdk/requirements.txt

audit: $(VENV)/.audit  ## look every pinned requirement up in a database of known vulnerabilities
	PYTHONPATH=tests $(BIN)/python -m support.advisories

test-requirements:  ## (as root) install what tests need of the system: neovim, age, gdb, node, zsh, PKCS#11 tokens, podman, ...
	.ci/provide

$(VENV)/.created:
	@.ci/venv $(PYTHON) $(VENV)
	@touch $@

# What is installed is remembered by a stamp: nothing is asked of the network until a pyproject.toml changes.
$(VENV)/.runtime: $(VENV)/.created $(PROJECTS)
	@echo "Installing keyferry and keyferry-agent into $(VENV): less than a minute ..."
	@.ci/pip $(PYTHON) $(VENV) -e 'client[module]' -e agent
	@$(BIN)/python -m compileall -q client/keyferry agent/keyferry_agent  # which an editable installation does not
	@touch $@

$(VENV)/.tokens: $(VENV)/.runtime
	@echo "Installing what PKCS#11 tokens need into $(VENV) ..."
	@.ci/pip $(PYTHON) $(VENV) -e 'client[pkcs11]'
	@touch $@

$(VENV)/.development: $(VENV)/.runtime .ci/requirements.txt
	@echo "Installing the development tools, and the versions that are tested, into $(VENV): about a minute ..."
	@.ci/pip $(PYTHON) $(VENV) --require-hashes -r .ci/requirements.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.development
	@echo "Installing what the benchmark compares with into $(VENV) ..."
	@.ci/pip $(PYTHON) $(VENV) --group bench
	@touch $@

$(VENV)/.fuzz: $(VENV)/.development .ci/requirements-fuzz.txt
	@echo "Installing the fuzzer into $(VENV) ..."
	@.ci/pip $(PYTHON) $(VENV) --require-hashes -r .ci/requirements-fuzz.txt
	@touch $@

$(VENV)/.mutants: $(VENV)/.development .ci/requirements-mutants.txt
	@echo "Installing what mutates the product into $(VENV) ..."
	@.ci/pip $(PYTHON) $(VENV) --require-hashes -r .ci/requirements-mutants.txt
	@touch $@

$(VENV)/.audit: $(VENV)/.development .ci/requirements-audit.txt
	@echo "Installing what asks for known vulnerabilities into $(VENV) ..."
	@.ci/pip $(PYTHON) $(VENV) --require-hashes -r .ci/requirements-audit.txt
	@touch $@

$(VENV)/.hosts: $(VENV)/.development .ci/requirements-hosts.txt
	@echo "Installing the validator of Kubernetes' manifests (108 MB) into $(VENV) ..."
	@.ci/pip $(PYTHON) $(VENV) --require-hashes -r .ci/requirements-hosts.txt
	@touch $@

clean:  ## remove what was made
	rm -rf $(VENV) .cache dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
