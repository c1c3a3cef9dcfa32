"""The configuration: everything that is wrong with it is said, by path; nothing unknown is ignored."""

import grp
import os
import pwd
from pathlib import Path

import pytest

from keyferry_agent.cli.main import main
from keyferry_agent.config.settings import Limits, Listener, Settings, SettingsError, read

PIN = "sha256:" + "ab" * 32
GRANT = '[[grant]]\nname = "g"\nto = {{ {to} }}\nactions = ["kms:*"]\nkeys = ["*"]\n'

FULL = f"""
socket  = "/run/keyferry/agent.sock"
mode    = "0600"
keyring = "/etc/keyferry/keyring.age"
unseal  = "/etc/keyferry/host.key"
region  = "cn-hangzhou"
account = "1234567890"
memory  = "prefer"
memory_backing = "mlock"
sm2_fallback = "gmssl"

[limits]
connections = 10
connections_per_user = 5
request_timeout = 2.5
requests_per_second = 100

[audit]
path = "/var/log/keyferry/audit.jsonl"

[[grant]]
name    = "orders"
to      = {{ user = "root", gid = 0 }}
actions = ["kms:GenerateAndExportDataKey", "kms:Export*"]
keys    = ["alias/orders-*", "acs:kms:cn-hangzhou:1234567890:key/*", "0a0a0a0a-0000-4000-8000-000000000000"]
recipients = ["{PIN}"]
encryption_context = {{ tenant = "acme" }}
"""


def written(tmp_path: Path, text: str) -> Path:
    """A configuration file."""
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def test_every_setting_is_read(tmp_path: Path) -> None:
    """Each setting is read with its type."""
    settings = read(written(tmp_path, FULL))
    assert settings.listeners == (Listener(mode=0o600),)
    assert (settings.keyring, settings.unseal) == (Path("/etc/keyferry/keyring.age"), Path("/etc/keyferry/host.key"))
    assert (settings.region, settings.account) == ("cn-hangzhou", "1234567890")
    assert (settings.memory, settings.memory_backing, settings.sm2_fallback) == ("prefer", "mlock", "gmssl")
    assert settings.limits == Limits(10, 5, 2.5, 100)
    assert settings.audit.path == "/var/log/keyferry/audit.jsonl"
    (grant,) = settings.grants
    assert grant.to == {"user": 0, "gid": 0}
    assert grant.recipients == frozenset({PIN})
    assert grant.encryption_context == {"tenant": "acme"}


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    """No setting is required, and no caller has a grant by default."""
    assert read(written(tmp_path, "")) == Settings()


def test_each_listener_has_its_own_settings(tmp_path: Path) -> None:
    """A listener has a name, a path, a mode and an owner."""
    me = pwd.getpwuid(os.getuid()).pw_name
    text = (
        f'[[listener]]\nname = "a"\npath = "/run/a"\nuser = "{me}"\ngroup = 7\n'
        '[[listener]]\nname = "b"\npath = "/run/b"\nmode = "0666"\n' + GRANT.format(to='listener = "a"')
    )
    settings = read(written(tmp_path, text))
    assert settings.listeners == (
        Listener("a", Path("/run/a"), 0o660, os.getuid(), 7),
        Listener("b", Path("/run/b"), 0o666),
    )


def test_credential_is_read_from_systemds_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting unseal = "credential:NAME" names a file in $CREDENTIALS_DIRECTORY."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/x.service")
    assert read(written(tmp_path, 'unseal = "credential:host"')).unseal == Path("/run/credentials/x.service/host")


@pytest.mark.parametrize(
    ("text", "path", "why"),
    [
        ("socket = 5", "socket", "path"),
        ('socket = "agent.sock"', "socket", "absolute"),
        ('sockets = "/run/x"', "sockets", "unknown"),
        ("mode = 0o660", "mode", "octal"),
        ('mode = "0999"', "mode", "octal"),
        ('mode = "1777"', "mode", "octal"),
        ('keyring = ""', "keyring", "path"),
        ('unseal = "credential:"', "unseal", "credential:NAME"),
        ('unseal = "credential:a/b"', "unseal", "credential:NAME"),
        ('region = "a:b"', "region", "letters"),
        ("account = 5", "account", "letters"),
        ('memory = "maybe"', "memory", "require, prefer"),
        ("memory = []", "memory", "require, prefer"),
        ('memory_backing = "swap"', "memory_backing", "memfd_secret"),
        ('sm2_fallback = "yes"', "sm2_fallback", "gmssl"),
        ("limits = 5", "limits", "table"),
        ("[limits]\nconnections = 0", "limits.connections", "from 1"),
        ("[limits]\nconnections = true", "limits.connections", "from 1"),
        ("[limits]\nrequest_timeout = 0", "limits.request_timeout", "seconds"),
        ("[limits]\nrequests_per_second = -1", "limits.requests_per_second", "from 0"),
        ("[limits]\nburst = 1", "limits.burst", "unknown"),
        ('[audit]\npath = "audit.log"', "audit.path", "absolute"),
        ('[audit]\npath = "stdout"', "audit.path", "expected an absolute path, or \"stderr\", not 'stdout'"),
        ('[audit]\npath = ""', "audit.path", 'or "stderr"'),
        ('[audit]\npath = "/a\\u0000"', "audit.path", 'or "stderr"'),
        ("[audit]\npath = 1", "audit.path", 'or "stderr"'),
        ("listener = 5", "listener", "[[listener]]"),
        ('[[listener]]\npath = "/a"', "listener[0].name", "missing"),
        ('[[listener]]\nname = "a"', "listener[0].path", "missing"),
        ('[[listener]]\nname = "a"\npath = "/a"\nuser = "no-such-user"', "listener[0].user", "user of this host"),
        ('[[listener]]\nname = "a"\npath = "/a"\n[[listener]]\nname = "a"\npath = "/b"', "listener", "same name"),
        ('socket = "/s"\n[[listener]]\nname = "a"\npath = "/a"', "socket", "not both"),
        ("[[grant]]", "grant[0].to", "missing"),
        (GRANT.format(to=""), "grant[0].to", "empty"),
        (GRANT.format(to="usr = 5"), "grant[0].to.usr", "unknown"),
        (GRANT.format(to='uid = "5"'), "grant[0].to.uid", "number"),
        (GRANT.format(to="uid = -1"), "grant[0].to.uid", "number"),
        (GRANT.format(to="user = 5"), "grant[0].to.user", "name"),
        (GRANT.format(to='exe = "x"'), "grant[0].to.exe", "absolute"),
        (GRANT.format(to='exe = "/x"'), "grant[0].to", "every user can run exe"),
        (
            GRANT.format(to=f'sha256 = "sha256:{"0" * 64}"'),
            "grant[0].to",
            "add access_key, pod, uid, unit, user or listener",
        ),
        (GRANT.format(to='group = "root", exe = "/x"'), "grant[0].to", "every user can run exe"),
        (GRANT.format(to='unit = "orders"'), "grant[0].to.unit", "orders.service"),
        (GRANT.format(to='pod = "web-1"'), "grant[0].to.pod", "UID"),
        (GRANT.format(to='sha256 = "ab"'), "grant[0].to.sha256", "hex"),
        (GRANT.format(to='access_key = "LTAI 5"'), "grant[0].to.access_key", "like LTAI"),
        (GRANT.format(to='access_key = ""'), "grant[0].to.access_key", "like LTAI"),
        (GRANT.format(to='listener = "nowhere"'), "grant[0].to.listener", "no listener"),
        (GRANT.format(to="uid = 5") + "recipients = []", "grant[0].recipients", "fingerprints"),
        (
            GRANT.format(to="uid = 5") + 'recipients = ["sha256:AB"]',
            "grant[0].recipients",
            "is not a valid fingerprint",
        ),
        (GRANT.format(to="uid = 5") + "encryption_context = { a = 1 }", "grant[0].encryption_context", "strings"),
        (GRANT.format(to="uid = 5") + "recipient = []", "grant[0].recipient", "unknown"),
        (GRANT.format(to="uid = 5").replace("kms:*", "kms:Explode"), "grant[0].actions", "kms:Explode"),
        (GRANT.format(to="uid = 5").replace("kms:*", "Decrypt"), "grant[0].actions", "is not a valid action"),
        (GRANT.format(to="uid = 5").replace('["*"]', '["alias/ü"]'), "grant[0].keys", "is not a valid key ID"),
        (GRANT.format(to="uid = 5").replace('["*"]', "[]"), "grant[0].keys", "list of keys"),
        (f'socket = "/{"x" * 107}"', "socket", "107 bytes"),
        ('mode = "0600"\n[[listener]]\nname = "a"\npath = "/a"', "mode", "not both"),
        (GRANT.format(to="uid = 4294967295"), "grant[0].to.uid", "number"),
        (GRANT.format(to="uid = 5").replace("kms:*", "kms:decrypt"), "grant[0].actions", "is not an action"),
        (GRANT.format(to="uid = 5").replace("kms:*", "kms:Foo*"), "grant[0].actions", "is not an action"),
        (
            GRANT.format(to="uid = 5").replace('["*"]', '["acs:kms:other:0:key/*"]'),
            "grant[0].keys",
            "not of this agent",
        ),
        (GRANT.format(to="uid = 5") + GRANT.format(to="uid = 6"), "grant[1].name", "same name"),
        ('[[listener]]\nname = "a"\npath = "/a"\nuser = -1', "listener[0].user", "user of this host"),
        ('[[listener]]\nname = "a"\npath = "/a"\ngroup = 4294967295', "listener[0].group", "group of this host"),
        ('[[listener]]\nname = "a"\npath = "/a"\nuser = "a\\u0000"', "listener[0].user", "user of this host"),
        (f"mode = 0x{'f' * 5_000}", "mode", "thousands of digits"),
        (f"keyring = [0x{'f' * 5_000}]", "keyring", "thousands of digits"),
        ('"a\\nb" = 1', "a\\nb", "unknown"),
    ],
)
def test_invalid_setting_is_named_by_its_path(tmp_path: Path, text: str, path: str, why: str) -> None:
    """The message has the expected value in words."""
    file = written(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        read(file)
    assert any(p.startswith(f"{file}: {path}: ") and why in p for p in caught.value.problems), caught.value.problems


def test_all_faults_are_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` prints a line for each fault, and exits with 1."""
    path = written(tmp_path, 'socket = 1\nbogus = 2\n[limits]\nconnections = "x"\n')
    assert main(["check", str(path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(str(path)) for line in lines)


def test_check_of_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0; a user that this host does not have is a warning, and its grant matches no caller."""
    path = written(tmp_path, GRANT.format(to='user = "no-such-user"'))
    assert main(["check", str(path)]) == 0
    captured = capsys.readouterr()
    assert "no-such-user" in captured.err
    assert "matches no caller" in captured.err
    assert "good; grants: 1" in captured.out
    assert "keyring: not set" in captured.err
    assert read(path).grants[0].to == {"user": -1}


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        ("uid = 65534", "uid"),
        (f'user = "{pwd.getpwuid(65_534).pw_name}"', "uid"),
        ("gid = 65534", "gid"),
        (f'group = "{grp.getgrgid(65_534).gr_name}"', "gid"),
    ],
)
def test_a_grant_to_an_overflow_number_is_a_warning(tmp_path: Path, to: str, kind: str) -> None:
    """Such a grant matches no caller."""
    (warning,) = read(written(tmp_path, GRANT.format(to=to))).warnings
    assert f"65534 is the overflow {kind}" in warning


@pytest.mark.parametrize("beside", ["uid = 5", 'user = "root"', 'unit = "a.service"', 'listener = "default"'])
def test_program_grant_needs_a_further_selector(tmp_path: Path, beside: str) -> None:
    """The selector may be any that separates one user, unit or socket from all others."""
    assert read(written(tmp_path, GRANT.format(to=f'exe = "/x", {beside}'))).grants[0].program == {"exe"}


@pytest.mark.parametrize("action", ["Encrypt", "Decrypt", "GenerateDataKey"])
def test_an_action_that_recipients_exclude_is_a_warning(tmp_path: Path, action: str) -> None:
    """The action of such a grant matches nothing."""
    text = GRANT.format(to="uid = 5").replace("kms:*", f"kms:{action}") + f'recipients = ["sha256:{"0" * 64}"]\n'
    (warning,) = read(written(tmp_path, text)).warnings
    assert f"grant[0].actions: a grant with recipients never covers kms:{action}" in warning
    assert not read(written(tmp_path, GRANT.format(to="uid = 5") + f'recipients = ["sha256:{"0" * 64}"]')).warnings


def test_impossible_user_name_matches_no_caller(tmp_path: Path) -> None:
    """The name is treated like any that this host does not have."""
    for selector in ("user", "group"):
        settings = read(written(tmp_path, GRANT.format(to=f'{selector} = "a\\u0000b"')))
        assert settings.grants[0].to == {selector: -1}
        assert "matches no caller" in settings.warnings[0]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a = = 1", "line 1"),
        (b"a = '\xff'", "not UTF-8"),
        (b"a = " + b"[" * 5_000, "not TOML"),
        (b"a = " + b"1" * 5_000, "not TOML"),
        (b"\xef\xbb\xbfaccount = '1'", r"byte order mark \(UTF-8\); save it as UTF-8 without one"),
        (b"\xef\xbb\xbf", "byte order mark"),
        ("account = '1'".encode("utf-16"), r"byte order mark \(UTF-16\); save it as UTF-8 without one"),
        (b"\xfe\xff" + "account = '1'".encode("utf-16-be"), "byte order mark"),
    ],
)
def test_invalid_toml_is_named_with_its_line(tmp_path: Path, content: bytes, why: str) -> None:
    """The position is the parser's own."""
    path = tmp_path / "agent.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=why):
        read(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read(tmp_path / "none.toml")
