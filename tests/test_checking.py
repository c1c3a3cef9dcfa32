"""`keyferry-agent check`: faults that would stop an agent on this host, and grants that never match. Nothing is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.agent import PATIENCE

from keyferry_agent.cli.main import main
from keyferry_agent.keyring import file
from keyferry_agent.keyring.access_keys import AccessKeyEntry
from keyferry_agent.keyring.document import now
from keyferry_agent.keyring.sealing import Unsealer

GRANT = '[[grant]]\nname = "g"\nto = {{ uid = 1 }}\nactions = ["kms:*"]\nkeys = [{keys}]\n'
SYSTEMCTL = r"""#!/bin/sh
[ "$1" = cat ] && { printf '%s\n' "$UNIT_TEXT"; exit 0; }
for last; do :; done
case $last in
*.service) printf '%s\n' "LoadState=${LOADED-loaded}" "Wants=$WANTS tmp.mount" Requires= "TriggeredBy=$TRIGGERED" \
    RuntimeDirectory=keyferry-agent LogsDirectory=keyferry ProtectSystem=strict ReadWritePaths= \
    "PrivateNetwork=${PRIVATE-yes}" "RestrictAddressFamilies=${FAMILIES-AF_UNIX}" ;;
*) printf '%s\n' "$SOCKETS" ;;
esac
"""
DEFAULT = "Id=keyferry-agent.socket\nActiveState=active\nFileDescriptorName=default\nListen={path} (Stream)"


@pytest.fixture
def config(keyring: Path, tmp_path: Path) -> Path:
    """A configuration of a keyring with `alias/a`, and a socket in a folder of this user."""
    path = tmp_path / "checked.toml"
    path.write_text(
        f'keyring = "{keyring}"\nunseal = "{keyring.parent / "identity"}"\nsocket = "{tmp_path / "agent.sock"}"\n'
    )
    return path


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    """Return the exit code of `check`, its output, and the lines on standard error."""
    code = main(["check", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.strip(), captured.err.splitlines()


def test_a_configuration_without_fault_has_no_warning(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` prints no warning for a good configuration, and makes no file beside it."""
    with config.open("a") as text:
        text.write(GRANT.format(keys='"alias/a", "alias/*", "*", "acs:kms:local:0:alias/a"'))
    before = sorted(tmp_path.rglob("*"))
    assert check(capsys, config) == (0, f"{config}: good; grants: 1", [])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "warning"),
    [
        (GRANT.format(keys='"alias/b"'), "grant[0].keys: 'alias/b' matches no key of the keyring"),
        (GRANT.format(keys='"alias/a", "z*"'), "grant[0].keys: 'z*' matches no key of the keyring"),
        ('[audit]\npath = "/nowhere/audit.jsonl"\n', "audit.path: /nowhere: No such file or directory"),
        ('[audit]\npath = "/tmp"\n', "audit.path: /tmp is a folder; name a file in it"),
        ('[audit]\npath = "/etc/passwd/audit"\n', "audit.path: /etc/passwd: not a folder"),
        ('[metrics]\nlisten = "/nowhere/m.sock"\n', "metrics.listen: /nowhere: No such file or directory"),
    ],
)
def test_faults_of_this_host_are_warnings(
    config: Path, capsys: pytest.CaptureFixture[str], more: str, warning: str
) -> None:
    """The configuration may be for another host, so the exit code is 0."""
    with config.open("a") as text:
        text.write(more)
    code, out, err = check(capsys, config)
    assert (code, out.rpartition("; ")[2]) == (0, "warnings: 1")
    assert err == [f"{config}: warning: {warning}"]


def test_a_grant_to_an_unusable_access_key_is_a_warning(
    keyring: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keyring has two access keys, and one of them is disabled."""
    with file.change(keyring, Unsealer.read(keyring.parent / "identity")) as document:
        for access_key_id, enabled in (("LTAIenabled", True), ("LTAIdisabled", False)):
            document.access_keys.append(AccessKeyEntry(access_key_id, now(), bytearray(b"s" * 30), enabled=enabled))
    with config.open("a") as text:
        for name in ("enabled", "disabled", "missing"):
            to = f'access_key = "LTAI{name}"'
            text.write(GRANT.format(keys='"alias/a"').replace('"g"', f'"{name}"').replace("uid = 1", to))
    assert check(capsys, config) == (
        0,
        f"{config}: good; grants: 3; warnings: 2",
        [
            f"{config}: warning: grant[1].to.access_key: LTAIdisabled is disabled in the keyring; the grant matches no caller",
            f"{config}: warning: grant[2].to.access_key: LTAImissing is not in the keyring; the grant matches no caller",
        ],
    )


def test_a_socket_folder_that_is_missing_is_a_warning(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the option that asks systemd."""
    config.write_text(config.read_text().replace("agent.sock", "nowhere/agent.sock"))
    (warning,) = check(capsys, config)[2]
    assert "listener 'default': " in warning
    assert "/nowhere: No such file or directory; or let systemd pass the socket (check --systemd)" in warning


def test_a_keyring_that_does_not_open_is_a_warning(
    config: Path, keyring: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` warns of a keyring whose content is damaged."""
    keyring.write_bytes(keyring.read_bytes()[:-1])
    (warning,) = check(capsys, config)[2]
    assert f"{config}: warning: keyring: " in warning


@pytest.mark.parametrize(
    ("package", "setting", "message"),
    [
        ("prometheus_client", '[metrics]\nlisten = "127.0.0.1:9464"', 'install the extra "metrics" of keyferry-agent'),
        ("gmssl", 'sm2_fallback = "gmssl"', "sm2_fallback needs the package gmssl"),
    ],
)
def test_a_missing_package_is_a_warning(tmp_path: Path, package: str, setting: str, message: str) -> None:
    """Only the setting that needs the package asks for it."""
    config = tmp_path / "agent.toml"
    code = f"import sys; sys.modules['{package}'] = None; from keyferry_agent.cli.main import main; sys.exit(main())"
    for text, expected in ((setting, True), ("", False)):
        config.write_text(f"{text}\n")
        ended = subprocess.run(
            [sys.executable, "-c", code, "check", str(config)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        assert (message in ended.stderr) is expected


# --- with systemd -----------------------------------------------------------------------------------------------------


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A systemctl that describes a service with the common socket; tests change its variables."""
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(SYSTEMCTL)
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name, value in (
        ("WANTS", "keyferry-agent.socket"),
        ("TRIGGERED", "keyferry-agent.socket"),
        ("SOCKETS", DEFAULT.format(path="/run/keyferry/agent.sock")),
        ("UNIT_TEXT", "[Service]\nLoadCredentialEncrypted=keyferry.unseal:/etc/credstore.encrypted/x\n"),
    ):
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_service_that_gets_all_it_needs_is_good(
    config: Path, systemctl: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Systemd passes the socket, and makes the folders at the start."""
    config.write_text(
        f"{config.read_text().replace(str(config.parent / 'agent.sock'), '/run/keyferry/agent.sock')}"
        '[audit]\npath = "/var/log/keyferry/audit.jsonl"\n[metrics]\nlisten = "/run/keyferry-agent/m.sock"\n'
    )
    assert check(capsys, "--systemd", config) == (0, f"{config}: good; grants: 0", [])


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"SOCKETS": DEFAULT.format(path="/run/b.sock").replace("=default", "=b")}, None),
        (
            {
                "SOCKETS": f"{DEFAULT.format(path='/run/x')}\n\n{DEFAULT.format(path='/run/b').replace('=default', '=b')}"
            },
            "listener: systemd hands over a socket named 'b' at /run/b, and no listener has this name or path",
        ),
        (
            {"SOCKETS": DEFAULT.format(path="/x").replace("=active", "=inactive"), "WANTS": ""},
            "may not write there; use /var/log/keyferry, or add ReadWritePaths=; no enabled socket unit has it",
        ),
        ({"LOADED": "not-found"}, "--systemd: keyferry-agent.service is not loaded"),
        ({"PATH": "/nonexistent"}, "--systemd: systemctl show: [Errno 2]"),
    ],
    ids=["sole socket", "stranger", "no socket", "no unit", "no systemctl"],
)
def test_faults_that_stop_the_service_are_errors(
    config: Path,
    systemctl: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    problem: str | None,
) -> None:
    """A sole socket belongs to a sole listener of any name."""
    for name, value in variables.items():
        systemctl.setenv(name, value)
    code, _, err = check(capsys, "--systemd", config)
    assert code == (0 if problem is None else 1)
    assert problem is None or problem in "\n".join(err)


GATEWAY = "Id=kf.socket\nActiveState=active\nFileDescriptorName={name}\nListen=127.0.0.1:8461 (Stream)"


@pytest.mark.parametrize(
    ("variables", "good"),
    [
        ({}, False),
        ({"SOCKETS": GATEWAY.format(name="kms")}, True),
        ({"SOCKETS": GATEWAY.format(name="kf")}, True),
        ({"SOCKETS": GATEWAY.format(name="kf").replace("8461", "8462")}, False),
        ({"PRIVATE": "no"}, False),
        ({"FAMILIES": "AF_INET6 AF_INET AF_UNIX"}, False),
        ({"PRIVATE": "no", "FAMILIES": "AF_INET6 AF_INET AF_UNIX"}, True),
        ({"PRIVATE": "no", "FAMILIES": "~AF_PACKET"}, True),
        ({"PRIVATE": "no", "FAMILIES": "~"}, True),
    ],
)
def test_a_gateway_needs_a_socket_unit_or_a_network(
    config: Path,
    systemctl: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    good: bool,
) -> None:
    """The shipped service may open no port itself. A socket belongs to the gateway with its name, or with its address."""
    sockets = [DEFAULT.format(path="/run/keyferry/agent.sock"), *variables.pop("SOCKETS", "").split("\n\n")]
    systemctl.setenv("SOCKETS", "\n\n".join(filter(None, sockets)))
    for name, value in variables.items():
        systemctl.setenv(name, value)
    config.write_text(
        f"{config.read_text().replace(str(config.parent / 'agent.sock'), '/run/keyferry/agent.sock')}"
        '[[gateway]]\nname = "kms"\nlisten = "127.0.0.1:8461"\n'
    )
    code, _, err = check(capsys, "--systemd", config)
    assert code == (0 if good else 1)
    assert good or "127.0.0.1:846" in "".join(err)


@pytest.mark.parametrize("name", ["keyferry.unseal", "other"])
def test_a_credential_has_to_be_loaded_by_the_unit(
    config: Path, systemctl: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A credential is absent before the service starts, so `check` reads the unit."""
    lines = [line for line in config.read_text().splitlines() if not line.startswith("unseal")]
    config.write_text("\n".join([*lines, f'unseal = "credential:{name}"', ""]))
    code, _, err = check(capsys, "--systemd", config)
    assert code == (name == "other")
    assert ("loads no credential 'other'" in "".join(err)) is (name == "other")
