"""Metrics: off by default, on a socket or a loopback port of their own, and with nothing in them that says too much."""

import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry, Gauge, MetricsHandler
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.calls import call_ok, call_refused
from support.keyring import serving
from support.scrape import UnixHTTP, scraped

from keyferry_agent.cli.main import main
from keyferry_agent.config import settings
from keyferry_agent.server import metrics_server
from keyferry_agent.telemetry import metrics


def test_scrape_has_requests_connections_and_the_keyring(keyring: Path, socket_path: Path) -> None:
    """Requests have operation, outcome and duration; all unknown operations count as one."""
    path = keyring.parent / "metrics"
    with (
        serving(keyring, socket_path, more=f'[metrics]\nlisten = "{path}"\n') as agent,
        RawConnection(agent.socket) as connection,
    ):
        for _ in range(3):
            call_ok(connection, "GenerateDataKey", {"KeyId": "alias/a", "EncryptionContext": {"tenant": "acme-secret"}})
        call_refused(connection, "Explode-123", {}, "InvalidAction.NotFound")
        samples = scraped(path)
        assert path.stat().st_mode & 0o777 == 0o660
        assert samples['keyferry_requests_total{operation="GenerateDataKey",outcome="OK"}'] == 3
        assert samples['keyferry_requests_total{operation="unknown",outcome="InvalidAction.NotFound"}'] == 1
        assert samples['keyferry_request_seconds_count{operation="GenerateDataKey"}'] == 3
        assert samples['keyferry_request_seconds_bucket{le="+Inf",operation="GenerateDataKey"}'] == 3
        assert samples["keyferry_connections"] == 1
        assert samples["keyferry_keys"] == 1
        assert samples["keyferry_draining"] == 0
        assert 0 < samples["keyferry_audit_lag_seconds"] < PATIENCE
        assert samples["keyferry_keyring_loaded_timestamp_seconds"] > 1.7e9
        assert not [name for name in samples if "acme" in name or "Explode" in name or "alias" in name]
        assert agent.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("[::1]", socket.AF_INET6)], ids=["IPv4", "IPv6"]
)
def test_loopback_port_serves_metrics(keyring: Path, socket_path: Path, host: str, family: int) -> None:
    """A scraper that cannot use a Unix socket uses the port."""
    with socket.create_server((host.strip("[]"), 0), family=family) as free:
        port = free.getsockname()[1]
    with serving(keyring, socket_path, more=f'[metrics]\nlisten = "{host}:{port}"\n'):
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=PATIENCE) as answer:
            assert b"keyferry_keys 1.0" in answer.read()
        other = keyring.parent / "other.toml"
        other.write_text((keyring.parent / "agent.toml").read_text())
        second = RunningAgent(["--config", str(other)], keyring.parent / "second")
        assert second.wait() == 1
        assert "in use" in "".join(second.output)
        second.kill()


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        (
            '"0.0.0.0:9464"',
            "metrics.listen: '0.0.0.0:9464' is not a loopback address, and metrics have no authentication",
        ),
        ('"[::]:9464"', "set remote = true"),
        ('"9464"', "metrics.listen: expected an absolute path, or an address"),
        ('"example.org:9464"\nremote = true', "metrics.listen: expected an absolute path, or an address"),
        ('"127.0.0.1:0"', "metrics.listen: expected"),
        ('"127.0.0.1:x"\nremote = true', "metrics.listen: expected"),
        ('"/run/keyferry/agent.sock"', "a listener has the path /run/keyferry/agent.sock"),
    ],
)
def test_an_address_of_other_hosts_takes_a_second_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], listen: str, why: str
) -> None:
    """An address that other hosts reach needs `remote = true`; a path and a loopback port do not."""
    config = tmp_path / "agent.toml"
    config.write_text(f"[metrics]\nlisten = {listen}\n")
    assert main(["check", str(config)]) == 1
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "10.1.2.3:9464", "[::]:9464", "127.0.0.1:9464", "/run/m.sock"])
def test_remote_accepts_every_address_of_this_host(tmp_path: Path, address: str) -> None:
    """The bind at the start shows whether the host has the address."""
    config = tmp_path / "agent.toml"
    config.write_text(f'[metrics]\nlisten = "{address}"\nremote = true\n')
    assert settings.read(config).metrics == address


def test_remote_without_an_address_is_an_error(tmp_path: Path) -> None:
    """The setting would have no effect without an address."""
    config = tmp_path / "agent.toml"
    config.write_text("[metrics]\nremote = true\n")
    with pytest.raises(settings.SettingsError, match=r"metrics\.remote: has no effect without listen"):
        settings.read(config)


def test_an_error_of_the_port_names_the_setting(keyring: Path, socket_path: Path) -> None:
    """Binding an address that this host does not have fails."""
    config = keyring.parent / "agent.toml"
    config.write_text('[metrics]\nlisten = "192.0.2.1:9464"\nremote = true\n')
    agent = RunningAgent(["--dev", "--config", str(config)], socket_path)
    assert agent.wait() == 1
    assert 'keyferry-agent: metrics: listen = "192.0.2.1:9464": ' in "".join(agent.output)
    agent.kill()


WITHOUT = (
    "import sys; sys.modules['prometheus_client'] = None; from keyferry_agent.cli.main import main; sys.exit(main())"
)


def test_missing_library_is_named_with_its_extra(tmp_path: Path) -> None:
    """An agent without metrics does not need the extra."""
    config = tmp_path / "agent.toml"
    config.write_text(f'[metrics]\nlisten = "{tmp_path / "m"}"\n')
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, "run", "--dev", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 1
    assert 'install the extra "metrics" of keyferry-agent' in ended.stderr


# --- slow and hostile clients -----------------------------------------------------------------------------------------

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
PROMPTLY = 3.0
"""Seconds: less than one scrape may take, and more than a busy machine needs for anything else."""


class Served:
    """An agent that serves metrics, and how to connect to them."""

    def __init__(self, agent: RunningAgent, connect: Callable[[], socket.socket], http: Callable[[], Any]) -> None:
        self.agent = agent
        self.connect = connect
        self._http = http

    def scrape(self) -> tuple[int, bytes]:
        """One good scrape: its status and text."""
        connection: HTTPConnection = self._http()
        try:
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def scrape_when_possible(self) -> float:
        """Scrape until a scrape is answered; return the seconds that it took."""
        began = time.monotonic()
        while time.monotonic() < began + PATIENCE:
            with suppress(OSError, http.client.HTTPException):
                assert self.scrape()[0] == 200
                break
            time.sleep(0.1)
        return time.monotonic() - began


@pytest.fixture(params=["TCP", "Unix"])
def served(request: pytest.FixtureRequest, keyring: Path, socket_path: Path) -> Iterator[Served]:
    """An agent with metrics on a loopback port, or on a Unix socket."""
    path = keyring.parent / "metrics"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}" if request.param == "TCP" else str(path)

    def over_tcp() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), PATIENCE)

    def over_unix() -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.connect(str(path))  # with a timeout it would not wait for room in the agent's queue
        made.settimeout(PATIENCE)
        return made

    with serving(keyring, socket_path, more=f'[metrics]\nlisten = "{address}"\n') as agent:
        if request.param == "TCP":
            yield Served(agent, over_tcp, lambda: HTTPConnection("127.0.0.1", port, timeout=PATIENCE))
        else:
            yield Served(agent, over_unix, lambda: UnixHTTP(str(path)))


def drip(connection: socket.socket, ended: threading.Event) -> None:
    """Send a request byte by byte, and never its end, until the agent closes the connection."""
    with suppress(OSError):
        connection.sendall(b"GET /metrics?")
        while not ended.wait(0.2):
            connection.sendall(b"x")
    ended.set()


def test_a_dripping_client_delays_neither_scrapes_nor_the_end(served: Served) -> None:
    """The agent exits promptly after SIGTERM, although a scrape is in flight."""
    ended = threading.Event()
    with served.connect() as connection:
        thread = threading.Thread(target=drip, args=(connection, ended))
        thread.start()
        began = time.monotonic()
        for _ in range(5):
            assert served.scrape()[0] == 200
        assert time.monotonic() - began < PROMPTLY
        began = time.monotonic()
        assert served.agent.stop() == 0
        assert time.monotonic() - began < PROMPTLY
        thread.join(PATIENCE)


def test_a_scrape_has_one_deadline_for_all_its_bytes(served: Served) -> None:
    """Single bytes do not extend the deadline of a scrape."""
    ended, began = threading.Event(), time.monotonic()
    with served.connect() as connection:
        drip(connection, ended)
    assert metrics_server.SCRAPE_SECONDS - 1 < time.monotonic() - began < 2 * metrics_server.SCRAPE_SECONDS
    assert served.scrape()[0] == 200


@pytest.mark.parametrize(
    "bytes_sent",
    [b"", REQUEST[:-2], REQUEST[:-2] + b"A: " + b"x" * 60_000],
    ids=["nothing", "half a request", "half a long header"],
)
def test_idle_clients_keep_no_scrape_from_being_answered(served: Served, bytes_sent: bytes) -> None:
    """The agent closes the oldest of too many scrapes to serve a new one."""
    with ExitStack() as stack:
        idle = [stack.enter_context(served.connect()) for _ in range(metrics_server.MAX_SCRAPES)]
        for client in idle:
            client.sendall(bytes_sent)
        began = time.monotonic()
        for _ in range(5):
            assert served.scrape()[0] == 200
        with suppress(ConnectionResetError):
            assert idle[0].recv(1) == b""
        assert time.monotonic() - began < PROMPTLY
        with RawConnection(served.agent.socket) as connection:
            call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"x" * 10_000_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"A: " + b"x" * 10_000_000 + b"\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + (b"A: " + b"x" * 60_000 + b"\r\n") * 99 + b"\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
        b"\x00\xff" * 1_000 + b"\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=["a huge line", "a huge header", "large headers", "many headers", "no HTTP", "another method"],
)
def test_invalid_scrape_affects_only_itself(served: Served, request_bytes: bytes) -> None:
    """The agent refuses the request before it allocates memory, logs nothing, and answers the next."""
    with served.connect() as connection, suppress(OSError):
        connection.sendall(request_bytes)
        while received := connection.recv(65_536):
            assert b" 200 " not in received
    assert served.scrape()[0] == 200
    assert served.agent.stop() == 0
    assert not [line for line in served.agent.output if not line.startswith("{")]
    assert not [line for line in served.agent.log if line["event"] == "metrics.failed"]


def test_a_reader_that_never_reads_has_the_same_deadline(served: Served) -> None:
    """The agent has more to send than the socket takes."""
    with ExitStack() as stack:
        for _ in range(metrics_server.MAX_SCRAPES):
            connection = stack.enter_context(served.connect())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            with suppress(OSError):
                connection.sendall(REQUEST * 200)
        assert served.scrape_when_possible() < 2 * metrics_server.SCRAPE_SECONDS
        began = time.monotonic()
        assert served.agent.stop() == 0
        assert time.monotonic() - began < PROMPTLY


def test_an_answer_that_is_not_read_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One write of many MiB is under the deadline, too."""
    monkeypatch.setattr(metrics_server, "SCRAPE_SECONDS", 0.5)
    began = threading.Event()
    ended = threading.Event()

    def answer(connection: socket.socket, deadline: float) -> None:
        began.set()
        try:
            metrics_server._Stream(connection, deadline).write(b"x" * 50_000_000)
        finally:
            ended.set()

    with answering(answer) as address, socket.create_connection(address):
        assert began.wait(PATIENCE)
        assert ended.wait(PROMPTLY)


def test_a_storm_of_connections_leaves_the_agent_serving(served: Served) -> None:
    """Connections open and close faster than the agent serves them."""
    for _ in range(100):
        with suppress(OSError):
            served.connect().close()
    assert served.scrape_when_possible() < 2 * metrics_server.SCRAPE_SECONDS


@contextmanager
def answering(answer: Callable[[socket.socket, float], object]) -> Iterator[tuple[str, int]]:
    """The address of a server in this process; at the end of the block its threads have ended."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    server = metrics_server.Server(listener, None, answer)
    try:
        yield address
    finally:
        server.close()
        for thread in threading.enumerate():
            if thread.name in ("keyferry-metrics", "keyferry-scrape"):
                thread.join(PATIENCE)


class _Metrics:
    """Metrics of which one cannot be read."""

    handler = MetricsHandler

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Gauge("keyferry_broken", "Broken", registry=self.registry).set_function(lambda: 1 / 0)


def test_a_metric_that_fails_is_logged_and_answered_with_500() -> None:
    """The exception reaches neither the agent nor standard error."""
    answer = metrics_server._handler(_Metrics())  # type: ignore[arg-type]
    with structlog.testing.capture_logs() as logged, answering(answer) as address:
        for _ in range(2 * metrics_server.MAX_SCRAPES):
            connection = HTTPConnection(*address, timeout=PATIENCE)
            connection.request("GET", "/metrics")
            assert connection.getresponse().status == 500
            connection.close()
            time.sleep(0.01)
    assert {line["event"] for line in logged} == {"metrics.failed"}


def test_a_request_that_cannot_be_counted_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing counter is logged once."""

    def fails(*_: object) -> None:
        raise RuntimeError

    counted = object.__new__(metrics.Metrics)
    counted._failed = False
    monkeypatch.setattr(counted, "_requests", SimpleNamespace(labels=fails), raising=False)
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            counted.observe("Decrypt", "OK", 0.1)
    assert [line["event"] for line in logged] == ["metrics.failed"]


def test_scrape_without_a_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of the refused scrape is free for the next one."""

    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with answering(lambda connection, _deadline: connection.sendall(b"answered")) as address:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            for _ in range(2 * metrics_server.MAX_SCRAPES):
                with socket.create_connection(address, PATIENCE) as connection:
                    assert connection.recv(8) == b""
        with socket.create_connection(address, PATIENCE) as connection:
            assert connection.recv(8) == b"answered"
