"""Metrics: off by default, on a socket or a loopback port of their own, and with nothing in them that says too much."""

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.asking import ok, refused
from support.keyring import serving
from support.scrape import scraped

from keyferry_agent.command import main


def test_a_scrape_tells_of_requests_connections_and_the_keyring(keyring: Path, socket_path: Path) -> None:
    """By operation and outcome, and how long they took; an operation that does not exist is counted as one."""
    path = keyring.parent / "metrics"
    with (
        serving(keyring, socket_path, more=f'[metrics]\nlisten = "{path}"\n') as agent,
        RawConnection(agent.socket) as connection,
    ):
        for _ in range(3):
            ok(connection, "GenerateDataKey", {"KeyId": "alias/a", "EncryptionContext": {"tenant": "acme-secret"}})
        refused(connection, "Explode-123", {}, "InvalidAction.NotFound")
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
def test_a_loopback_port_serves_them_too(keyring: Path, socket_path: Path, host: str, family: int) -> None:
    """For whoever can scrape nothing else."""
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


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "9464", "example.org:9464", "127.0.0.1:0", "127.0.0.1:x"])
def test_metrics_are_served_to_this_host_only(tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str) -> None:
    """Anything but a socket's path and a loopback port is an error of the configuration."""
    config = tmp_path / "agent.toml"
    config.write_text(f'[metrics]\nlisten = "{address}"\n')
    assert main(["check", str(config)]) == 1
    assert "metrics.listen: expected an absolute path, or a loopback address" in capsys.readouterr().err


WITHOUT = (
    "import sys; sys.modules['prometheus_client'] = None; from keyferry_agent.command import main; sys.exit(main())"
)


def test_a_missing_library_is_said_with_what_installs_it(tmp_path: Path) -> None:
    """It is an extra: an agent without metrics does not need it."""
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
    assert "pip install 'keyferry-agent[metrics]'" in ended.stderr
