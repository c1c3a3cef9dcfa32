# Everything a newcomer needs: `make demo` and `make test` set themselves up in .venv, and work again without a network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROJECTS := client/pyproject.toml agent/pyproject.toml pyproject.toml

.PHONY: demo test check format coverage memory records docs wheels requirements test-requirements clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

demo: $(VENV)/.runtime  ## the main job, step by step, with an agent of its own
	@$(BIN)/python docs/demo/main_job.py

test: $(VENV)/.development  ## linters, types, and the whole test suite with its coverage gate
	@$(MAKE) --no-print-directory check coverage

check: $(VENV)/.development
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

coverage: $(VENV)/.development
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	@cat .cache/skipped

format: $(VENV)/.development  ## put every file into the project's form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

memory: $(VENV)/.development  ## measure what is in the agent's memory while it works (docs/memory.md)
	PYTHONPATH=tests $(BIN)/python tests/measure_memory.py

records: $(VENV)/.development  ## measure a rewrap of 100,000 records on SQLite and PostgreSQL (docs/records.md)
	PYTHONPATH=tests $(BIN)/python tests/measure_records.py

docs: $(VENV)/.development  ## write the generated parts of PROTOCOL.md
	PYTHONPATH=tests $(BIN)/python tests/support/reference.py

wheels: $(VENV)/.development  ## build both distributions into dist/
	$(BIN)/python -m build --quiet --outdir dist client
	$(BIN)/python -m build --quiet --outdir dist agent

requirements: $(VENV)/.development  ## write deploy/requirements.txt: what an agent needs, pinned and hashed
	@.ci/pip $(PYTHON) $(VENV) uv==0.13.9
	$(BIN)/uv pip compile agent/pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-package keyferry --output-file deploy/requirements.txt

test-requirements:  ## (as root) install what some tests need of the system: neovim, age, gdb, node, openssl, postgresql, zsh
	.ci/provide

$(VENV)/.created:
	@.ci/venv $(PYTHON) $(VENV)
	@touch $@

# What is installed is remembered by a stamp: nothing is asked of the network until a pyproject.toml changes.
$(VENV)/.runtime: $(VENV)/.created $(PROJECTS)
	@echo "Installing keyferry and keyferry-agent into $(VENV) ..."
	@.ci/pip $(PYTHON) $(VENV) -e 'client[module]' -e agent
	@touch $@

$(VENV)/.development: $(VENV)/.runtime
	@echo "Installing the development tools into $(VENV) ..."
	@.ci/pip $(PYTHON) $(VENV) -e 'client[module,async,store]' -e agent --group dev
	@touch $@

clean:  ## remove what was made
	rm -rf $(VENV) .cache dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
