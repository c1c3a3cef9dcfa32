"""Fixtures for all tests, and the end of the run: tests that this machine skips, and how to provide their needs."""

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import hypothesis
import pytest
from support import crashing_rewrap, skip_unless, tokens
from support.agent import RunningAgent, dev_agent
from support.fast import is_fast
from support.keyring import Command, new_keyring, printed
from support.postgres import Cluster
from support.quick_scrypt import make_scrypt_quick
from support.rotatable_agent import RotatableAgent, rotating_agent
from support.skip_unless import ROOT, postgresql
from support.tokens import RealToken

from keyferry.module import Pkcs11Module
from keyferry.store import Store
from keyferry.store import store as store_module

PROVIDE = "sudo make test-requirements (and what a line itself says)"
NO_SKIPS = "KEYFERRY_NO_SKIPS"
NEEDS_PROCESSOR = "needs a processor"
SKIPPED = ROOT / ".cache" / "skipped"
COUNTS = ROOT / ".cache" / "counts"
"""The list with which `make test` ends, and the numbers in its last line."""

_SHARE_OF_TIMEOUT = 0.75
"""Of pytest's faulthandler_timeout, which ends the whole process."""
_FAIL_AGAIN_SECONDS = 5.0
"""Seconds after which a test fails in its teardown too, where it waits for its own processes."""

# The time of an input has no limit: on a busy machine it depends on other processes.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

os.umask(0o022)  # under 002, the configurations that tests write would be group-writable, which the agent refuses


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Ignore a signal in this process alone: other than SIG_IGN, a handler is not inherited by a program that is executed."""


# Background jobs, nohup and many CI runners start programs with these signals ignored. Programs inherit that, but no handler;
# and tests send the signals to programs that they start.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _ignore)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take `--fast`."""
    parser.addoption("--fast", action="store_true", help="only tests that start no process (support/fast.py)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are not fast with `--fast`."""
    if config.getoption("fast"):
        left_out = [item for item in items if not is_fast(item)]
        items[:] = [item for item in items if is_fast(item)]
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Run one worker more than there are cores: a test often waits for a process, or for a time."""
    return len(os.sched_getaffinity(0)) + 1


@contextmanager
def _bounded(item: pytest.Item) -> Iterator[None]:
    """Fail a test at its time limit, with a traceback of the place, before pytest ends the whole process."""
    seconds = _SHARE_OF_TIMEOUT * float(item.config.getini("faulthandler_timeout"))

    def fail(_number: int, _frame: FrameType | None) -> None:
        pytest.fail(f"{item.nodeid} has not ended in {seconds:g} s; the last line of the traceback waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds, _FAIL_AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Bound the time of a test's fixtures."""
    with _bounded(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Bound the time of a test."""
    with _bounded(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Bound the time of a test's end."""
    with _bounded(item):
        yield


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """One agent with --dev for all tests that leave it as they found it."""
    with dev_agent(tmp_path_factory.mktemp("agent") / "agent.sock") as running:
        yield running


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    """Where a test's own agent may listen."""
    return tmp_path / "agent.sock"


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that other users can reach: pytest's own are its user's, and each run makes them so again."""
    with tempfile.TemporaryDirectory(prefix="keyferry-test-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def shared_socket(shared_folder: Path) -> Path:
    """Where an agent may listen for other users."""
    return shared_folder / "agent.sock"


@pytest.fixture
def keyring(tmp_path: Path) -> Path:
    """A sealed keyring of a test's own, its identity beside it: alias/a is in it."""
    return new_keyring(tmp_path)


@pytest.fixture
def quick_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute scrypt at almost no cost: for tests that are not about it."""
    make_scrypt_quick(monkeypatch)


@pytest.fixture
def keyring_json(keyring: Path) -> Command:
    """Run a verb on the keyring with --json; give what it printed."""
    return partial(printed, keyring)


@pytest.fixture(scope="session")
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> list[RealToken]:
    """Two tokens in one SoftHSM2: app, which most tests share, and spare."""
    return tokens.softhsm(tmp_path_factory.mktemp("softhsm"), "app", "spare")


@pytest.fixture(scope="session")
def softhsm_token(softhsm: list[RealToken]) -> RealToken:
    """The SoftHSM2 token that most tests share."""
    return softhsm[0]


@pytest.fixture(scope="session")
def nss_token(tmp_path_factory: pytest.TempPathFactory) -> RealToken:
    """The token of one NSS database, which its library keeps after the initialisation, for all tests."""
    return tokens.softokn(tmp_path_factory.mktemp("nss"))


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=skip_unless.program(*tokens.PROGRAMS[name])) for name in tokens.PROGRAMS],
)
def token(request: pytest.FixtureRequest) -> RealToken:
    """A PKCS#11 token of each kind."""
    token: RealToken = request.getfixturevalue("nss_token" if request.param == "softokn" else "softhsm_token")
    return token


@pytest.fixture
def module(token: RealToken) -> Iterator[Pkcs11Module]:
    """A module in a token of each kind."""
    module = token.open()
    yield module
    module.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """One PostgreSQL server for all tests: a test that stops it starts it again."""
    with Cluster() as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=postgresql())])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a test's own store, for each kind of database in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'records.sqlite'}"
    postgres: Cluster = request.getfixturevalue("postgres")
    return postgres.new_database()


@pytest.fixture
def rotatable_agent(tmp_path: Path) -> Iterator[RotatableAgent]:
    """An agent with a keyring of its own."""
    with rotating_agent(tmp_path) as rotatable_agent:
        yield rotatable_agent


@pytest.fixture
def sqlite_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty store in SQLite, with pages so small that there are several."""
    monkeypatch.setattr(store_module, "_PAGE_RECORDS", crashing_rewrap.PAGE)
    with Store(f"sqlite:///{tmp_path / 'records.sqlite'}") as made:
        yield made


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the list of skipped tests, which `make test` ends with; fail if no skip is allowed."""
    if hasattr(session.config, "workerinput"):
        return  # one of several processes that run tests: the one that started them knows all
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    SKIPPED.parent.mkdir(exist_ok=True)
    SKIPPED.write_text(summary(reasons))
    passed = reporter.stats.get("passed", []) if reporter else []
    COUNTS.write_text(f"{len(passed):,} tests passed, {len(skipped):,} skipped\n")
    # No installation provides another processor.
    is_incomplete = any(not reason.startswith(NEEDS_PROCESSOR) for reason in reasons)
    if is_incomplete and os.environ.get(NO_SKIPS) and not exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Say it at the end of pytest's own report, too; after a failure, name the seed of the order."""
    terminalreporter.write(SKIPPED.read_text())
    if exitstatus and isinstance(seed := config.getoption("randomly_seed", None), int):
        terminalreporter.write_line(f"To repeat the order of these tests: .venv/bin/pytest -n0 --randomly-seed={seed}")


def summary(reasons: Counter[str]) -> str:
    """The list of reasons, and the command that removes them."""
    if not reasons:
        return "Nothing was skipped.\n"
    lines = [
        f"{count:5} {'test needs' if count == 1 else 'tests need'} {reason.removeprefix('needs ')}"
        for reason, count in sorted(reasons.items())
    ]
    return "\n".join(["Skipped, for what this machine lacks:", *lines, f"To provide it: {PROVIDE}", ""])
