"""Health: the state that an agent reports while it refuses calls, without audit entries; probes; alert rules."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.fake_service_manager import Manager
from support.keyring import change, configuration, serving
from support.scrape import scraped
from support.skip_unless import ROOT, root
from test_unseal import manual, secret, unseal

from keyferry import KmsError
from keyferry_agent import health
from keyferry_agent.cli.main import main
from keyferry_agent.telemetry import metrics

FULL = '[audit]\npath = "/dev/full"\n'


def probe(agent: RunningAgent, *arguments: str) -> tuple[int, Any]:
    """Return the exit code and output of `keyferry status`."""
    ended = subprocess.run(
        [sys.executable, "-m", "keyferry", "status", "--socket", str(agent.socket), *arguments],
        capture_output=True,
        check=False,
        timeout=PATIENCE,
    )
    return ended.returncode, json.loads(ended.stdout or ended.stderr)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_is_in_status_probes_and_metrics(keyring: Path, socket_path: Path) -> None:
    """The agent is alive and not ready, and reports the reason; a restart would not help."""
    metrics_path = keyring.parent / "metrics"
    more = f'{FULL}[metrics]\nlisten = "{metrics_path}"\n'
    with serving(keyring, socket_path, more=more) as agent, agent.client() as kms:
        assert kms.get_agent_health().ready  # no entry could not be written yet
        with pytest.raises(KmsError, match="audit record"):
            kms.describe_key(key_id="alias/a")
        status = kms.get_agent_status()
        assert (status.state, status.ready) == ("Refusing", False)
        assert [(each.name, each.message) for each in status.conditions] == [
            ("AuditFailing", "the audit log cannot be written")
        ]
        assert probe(agent, "--live")[0] == 0
        code, answer = probe(agent, "--ready")
        assert (code, answer["State"]) == (1, "Refusing")
        assert probe(agent)[1]["State"] == "Refusing"
        samples = scraped(metrics_path)
        assert samples['keyferry_condition{condition="AuditFailing"}'] == 1
        assert (samples["keyferry_ready"], samples["keyferry_sealed"]) == (0, 0)
        assert samples["keyferry_audit_failures_total"] >= 2


def test_an_agent_that_serves_unrecorded_calls_is_ready(keyring: Path, socket_path: Path) -> None:
    """The condition is reported although the agent is ready."""
    with serving(keyring, socket_path, more=f'{FULL}on_failure = "serve"\n') as agent, agent.client() as kms:
        kms.describe_key(key_id="alias/a")
        answer = kms.get_agent_health()
        assert (answer.state, answer.ready) == ("Serving", True)
        assert [each.name for each in answer.conditions] == ["AuditFailing"]


@root()
def test_an_agent_is_ready_again_without_a_request(
    keyring: Path, socket_path: Path, small_disk: Path, tmp_path: Path
) -> None:
    """The service manager hears of both changes, and an entry says how many requests are missing."""
    audit = small_disk / "audit.jsonl"
    manager = Manager(tmp_path)
    (keyring.parent / "agent.toml").write_text(configuration(keyring, more=f'[audit]\npath = "{audit}"\n'))
    with manager.start(["--config", str(keyring.parent / "agent.toml")], path=socket_path) as agent:
        filler = small_disk / "filler"
        with open(filler, "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1024))
        with RawConnection(agent.socket) as connection:
            while connection.call("DescribeKey", {"KeyId": "alias/a"}).error is None:
                pass
        manager.wait_for_status("Refusing: 1 key in ")
        filler.unlink()
        manager.wait_for_status("Serving: 1 key in ")
        agent.wait_for("audit.resumed")
        assert probe(agent, "--ready")[0] == 0
    manager.close()
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [each["unrecorded"] for each in entries if each["event"] == "audit.resumed"] == [1]
    assert main(["audit", "verify", str(audit)]) == 0


def test_health_has_no_audit_entry_and_status_has_one(keyring: Path, socket_path: Path) -> None:
    """Refused health requests are recorded like all refused requests."""
    audit = keyring.parent / "audit.jsonl"
    more = f'[audit]\npath = "{audit}"\n'
    with serving(keyring, socket_path, more=more, actions="kms:Decrypt") as agent, agent.client() as kms:
        for _ in range(3):
            assert kms.get_agent_health().ready
            assert probe(agent, "--live")[0] == probe(agent, "--ready")[0] == 0
        with pytest.raises(KmsError, match="does not have this parameter"):
            kms.call("GetAgentHealth", {"KeyId": "alias/a"})
        probe(agent)
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    recorded = [(each["operation"], each["outcome"]) for each in entries if each["event"] == "audit"]
    assert recorded == [("GetAgentHealth", "InvalidParameter"), ("GetAgentStatus", "OK")]


def test_a_sealed_agent_is_live_and_not_ready(keyring: Path, socket_path: Path) -> None:
    """A liveness probe must not restart a sealed agent; --wait waits until it is ready."""
    with RunningAgent(manual(keyring), socket_path) as agent:
        assert probe(agent, "--live")[0] == 0
        code, answer = probe(agent, "--ready", "--wait", "0.3")
        assert (code, answer["State"], answer["Conditions"][0]["Name"]) == (1, "Sealed", "Sealed")
        waiting = subprocess.Popen(
            [sys.executable, "-m", "keyferry", "status", "--socket", str(agent.socket), "--ready", "--wait", "60"],
            stdout=subprocess.DEVNULL,
        )
        assert unseal(keyring, given=secret(keyring)).returncode == 0
        assert waiting.wait(PATIENCE) == 0


def test_a_refusal_is_a_sign_of_life(keyring: Path, socket_path: Path) -> None:
    """A rate limit must not restart the agent, which is not ready for this caller."""
    more = "[limits]\nconnections = 1\n"
    with serving(keyring, socket_path, more=more) as agent, agent.client() as kms:
        assert kms.get_agent_health().ready
        code, answer = probe(agent, "--live")
        assert (code, answer["Code"]) == (0, "Rejected.Throttling")
        code, answer = probe(agent, "--ready")
        assert (code, answer["Code"]) == (1, "Rejected.Throttling")


def test_every_metric_of_the_alert_rules_is_in_a_scrape(keyring: Path, socket_path: Path) -> None:
    """Each rule has the fields that Prometheus and an operator need."""
    path = keyring.parent / "metrics"
    change(keyring, "create-key", "--alias", "alias/b")
    change(keyring, "schedule-deletion", "alias/b", "--days", "7")
    with serving(keyring, socket_path, more=f'[metrics]\nlisten = "{path}"\n') as agent, agent.client() as kms:
        kms.describe_key(key_id="alias/a")
        samples = scraped(path)
    names = {sample.partition("{")[0] for sample in samples}
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus-rules.yaml").read_text())
    assert rules.keys() == {"groups"}
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "action"}
        asked = set(re.findall(r"\bkeyferry_[a-z_]+", rule["expr"]))
        assert asked
        assert asked <= names, rule["alert"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
        for condition in re.findall(r'condition="(\w+)"', rule["expr"]):
            assert condition in health.MESSAGES
    assert samples['keyferry_keys_by_state{state="Enabled"}'] == 1
    assert samples['keyferry_keys_by_state{state="PendingDeletion"}'] == 1
    assert 6 * 86_400 < samples["keyferry_next_deletion_seconds"] <= 7 * 86_400
    assert 0 <= samples["keyferry_oldest_primary_version_age_seconds"] < 3_600
    assert any(sample.startswith("keyferry_build_info{") for sample in samples)


def test_every_metric_is_explained(keyring: Path, socket_path: Path) -> None:
    """agent/README.md names each metric."""
    path = keyring.parent / "metrics"
    page = (ROOT / "agent" / "README.md").read_text()
    with RunningAgent([*manual(keyring, f'[metrics]\nlisten = "{path}"\n')], socket_path):
        samples = scraped(path)
    assert samples["keyferry_sealed"] == 1
    assert samples["keyferry_keyring_loaded_timestamp_seconds"] == 0
    for sample in samples:
        name = re.sub(r"(_created|_bucket|_count|_sum)?(\{.*)?$", "", sample)
        assert name.startswith(("process_", "python_")) or f"`{name}" in page, name


def test_a_failed_reload_is_counted_and_in_the_status(keyring: Path, socket_path: Path) -> None:
    """The condition ends with the next good reload; the counter stays."""
    path = keyring.parent / "metrics"
    config = keyring.parent / "agent.toml"
    with serving(keyring, socket_path, more=f'[metrics]\nlisten = "{path}"\n') as agent:
        good = config.read_text()
        config.write_text("nonsense")
        agent.wait_for("reload.failed")
        with agent.client() as kms:
            assert "ReloadFailed" in {each.name for each in kms.get_agent_health().conditions}
        config.write_text(good)
        agent.wait_for("reload.done")
        samples = scraped(path)
    assert samples["keyferry_reload_failures_total"] >= 1
    assert samples['keyferry_condition{condition="ReloadFailed"}'] == 0


def test_the_commit_of_a_build_is_known_where_pip_noted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip notes the commit of an installation from a repository, and none for local files."""

    class Noted:
        def __init__(self, text: str | None) -> None:
            self.text = text

        def read_text(self, _name: str) -> str | None:
            return self.text

    for text, commit in ((None, ""), ('{"vcs_info": {"commit_id": "abc"}}', "abc"), ("[]", ""), ("no JSON", "")):
        monkeypatch.setattr(metadata, "distribution", lambda _name, text=text: Noted(text))
        assert metrics._commit() == commit
