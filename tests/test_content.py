"""Files are checked before they seal anything. A file that opens nothing is named by its apparent kind."""

import re
import subprocess
from base64 import b64encode
from pathlib import Path

import pyrage
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from support.keyring import opened, run
from support.keys import rsa_private_key, spki
from support.secrets import secret_file
from support.skip_unless import program

from keyferry import age_passphrase, command, passphrase
from keyferry.command.modules import open_module
from keyferry.content import byte_order_mark, resemblance
from keyferry.module import ModuleError, SoftwareModule
from keyferry_agent.keyring import file
from keyferry_agent.keyring.document import Document
from keyferry_agent.keyring.sealing import Unsealer

pytestmark = pytest.mark.usefixtures("quick_scrypt")
GOOD = "correct horse battery"
IDENTITY = str(pyrage.x25519.Identity.generate())
RECIPIENT = str(pyrage.x25519.Identity.from_str(IDENTITY).to_public())
DER = spki(rsa_private_key())
PKCS8 = rsa_private_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PKCS1 = rsa_private_key().public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
SSH = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAYOawz/bc+trOdz0aQqrIESC3DAJ75YAaOmefGzbtPx"

REFUSED: dict[str, tuple[bytes, str]] = {
    "an identity file": (f"# public key: {RECIPIENT}\n{IDENTITY}\n".encode(), "age identity"),
    "an identity": (f"{IDENTITY}\n".encode(), "age identity"),
    "an identity in lower case": (IDENTITY.lower().encode(), "age identity"),
    "an identity in quotes": (f'"{IDENTITY}"'.encode(), "age identity"),
    "an identity behind a space": (f"  {IDENTITY}\n".encode(), "age identity"),
    "an identity in the last line": (f"one\ntwo\n{IDENTITY}".encode(), "age identity"),
    "a post-quantum identity": (b"AGE-SECRET-KEY-PQ-1QQQQ\n", "post-quantum"),
    "a plugin identity": (b"age-plugin-yubikey-1QQQQ\n", "age plugin"),
    "an age file": (b"age-encryption.org/v1\n-> X25519 abc\n", "age file"),
    "an armoured age file": (b"-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n", "age file"),
    "a PEM private key": (PKCS8, "private key in PEM"),
    "a PEM private key behind a line": (b"key:\n" + PKCS8, "private key in PEM"),
    "an OpenSSH key": (b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n", "OpenSSH private key"),
    "an SSH2 key": (b"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\n", "private key"),
    "a PuTTY key": (b"PuTTY-User-Key-File-3: ssh-ed25519\n", "PuTTY"),
    "a certificate": (b"-----BEGIN CERTIFICATE-----\nMIIB\n", "certificate"),
    "any PEM": (b"-----BEGIN X-----", "PEM"),
    "a public key": (b64encode(DER), "public key"),
    "the DER of a private key": (b64encode(PKCS1), "public key"),
    "a comment": (b"# the passphrase\n", "begins with #"),
    "a comment before a passphrase": (f"# note\n{GOOD}\n".encode(), "#|more than one line"),
    "two lines": (f"{GOOD}\nanother\n".encode(), "more than one line"),
    "two lines of CRLF": (f"{GOOD}\r\nanother\r\n".encode(), "more than one line"),
    "a line behind empty lines": (f"{GOOD}\n\n\nanother".encode(), "more than one line"),
    "two lines of CR": (f"{GOOD}\ranother".encode(), "more than one line"),
    "two lines of U+2028": (f"{GOOD}\u2028another".encode(), "more than one line"),
    "a UTF-8 byte order mark": (f"\ufeff{GOOD}\n".encode(), "byte order mark"),
    "UTF-16": (GOOD.encode("utf-16"), "byte order mark"),
    "UTF-16, big-endian": (b"\xfe\xff" + GOOD.encode("utf-16-be"), "byte order mark"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), "NUL"),
    "UTF-32": (GOOD.encode("utf-32"), "byte order mark"),
    "a NUL byte": (f"{GOOD}\0more".encode(), "NUL"),
    "Latin-1": ("pass wört zwölf".encode("latin-1"), "not text in UTF-8"),
    "a recipient": (f"{RECIPIENT}\n".encode(), "age recipient"),
    "a recipient in upper case": (RECIPIENT.upper().encode(), "age recipient"),
    "a plugin's recipient": (b"age1yubikey1qqqqqqqqqqqq", "age recipient"),
    "an SSH public key": (SSH + b" root@host\n", "SSH public key"),
    "an ECDSA public key": (b"ecdsa-sha2-nistp256 AAAAE2VjZHNh x", "SSH public key"),
    "a line of authorized_keys": (b"no-pty " + SSH, "SSH public key"),
    "a leading space": (f" {GOOD}\n".encode(), "white space"),
    "a trailing space": (f"{GOOD} \r\n".encode(), "white space"),
    "a trailing tab": (f"{GOOD}\t\n".encode(), "white space"),
    "a no-break space at the end": (f"{GOOD}\u00a0".encode(), "white space"),
    "spaces alone": (b"   \n", "white space"),
    "an escape sequence": (f"{GOOD}\x1b[A".encode(), "control character"),
    "nothing": (b"", "empty"),
    "an empty line": (f"\n{GOOD}\n".encode(), "empty"),
    "65,537 bytes": (b"x" * 65_537, "longer than"),
}
ACCEPTED = [
    f"{GOOD}",
    f"{GOOD}\n",
    f"{GOOD}\r\n",
    f"{GOOD}\n\n\n",
    f"{GOOD}\r\n\r\n  \n",
    "zwölf # Zeichen",
    "age1 of 12 horses",
    "a\tb" * 5,
]
AS_TEXT = {
    name: content
    for name, (content, _) in REFUSED.items()
    if name
    in (
        "an identity",
        "an identity in lower case",
        "a PEM private key",
        "a comment",
        "two lines",
        "two lines of CR",
        "a recipient",
        "an SSH public key",
        "a trailing space",
        "nothing",
        "a NUL byte",
        "a UTF-8 byte order mark",
    )
}


@pytest.mark.parametrize(("content", "why"), REFUSED.values(), ids=REFUSED)
def test_file_without_a_passphrase_seals_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, why: str
) -> None:
    """`init`, `reseal` and `module init` name the file and its apparent kind, show no content, and write nothing."""
    wrong = ["--passphrase-file", secret_file(tmp_path / "wrong", content)]
    run("init", tmp_path / "new.age", *wrong, code=1)
    run("init", tmp_path / "k.age", "--new-identity", tmp_path / "identity")
    before = (tmp_path / "k.age").read_bytes()
    capsys.readouterr()
    run("reseal", tmp_path / "k.age", *wrong, "--unseal", tmp_path / "identity", code=1)
    assert command.main(["module", "init", str(tmp_path / "m"), *map(str, wrong), "--key-spec", "EC_SM2"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    for line in (first, second):
        assert f": {tmp_path / 'wrong'}: " in line
        assert any(word in line for word in why.split("|")), line
        assert IDENTITY.lower()[:30] not in line.lower()
        assert GOOD not in line
    assert (tmp_path / "k.age").read_bytes() == before
    assert not (tmp_path / "new.age").exists()
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("content", ACCEPTED)
def test_one_line_of_text_is_a_passphrase(content: str) -> None:
    """Line ends and empty lines behind it are not part of it."""
    assert passphrase.of_new_file(content.encode()) == content.splitlines()[0]


def test_a_generated_passphrase_is_accepted() -> None:
    """No generated passphrase looks like something else."""
    for _ in range(200):
        phrase = passphrase.generate()
        assert passphrase.of_new_file(f"{phrase}\n".encode()) == phrase


@pytest.mark.parametrize("content", AS_TEXT.values(), ids=AS_TEXT)
def test_module_is_not_saved_with_an_identity_as_passphrase(tmp_path: Path, content: bytes) -> None:
    """The library refuses the obvious cases before it writes."""
    with pytest.raises(ValueError, match="passphrase") as caught:
        SoftwareModule.generate().save(tmp_path / "m", content.decode())
    assert IDENTITY not in str(caught.value)
    assert not (tmp_path / "m").exists()


OLD = {
    name: REFUSED[name][0]
    for name in (
        "an identity in lower case",
        "a plugin identity",
        "a comment before a passphrase",
        "two lines",
        "a UTF-8 byte order mark",
        "a recipient",
        "an SSH public key",
        "a trailing space",
        "a NUL byte",
        "a public key",
    )
}


@pytest.mark.parametrize("content", OLD.values(), ids=OLD)
def test_a_file_that_sealed_a_keyring_once_still_opens_it(tmp_path: Path, content: bytes) -> None:
    """The first line is the passphrase; changes keep it."""
    phrase = content.decode().split("\n", 1)[0].rstrip("\r")
    secret_file(tmp_path / "identity", content)
    file.create(tmp_path / "k.age", Document([]), phrase)
    run("create-key", tmp_path / "k.age", "--alias", "alias/a", "--unseal", tmp_path / "identity")
    assert "alias/a" in opened(tmp_path / "k.age").aliases


def test_a_module_sealed_by_a_pem_file_opens_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line of every PEM file is public."""
    module = SoftwareModule.generate("EC_SM2")
    der = module._private_key.private_der()
    secret_file(tmp_path / "m", age_passphrase._seal(der, PKCS8.decode().splitlines()[0], 10))
    arguments = command._parser().parse_args(
        [
            "encrypt-file",
            "--record",
            "r",
            "i",
            "o",
            "--module",
            str(tmp_path / "m"),
            "--passphrase-file",
            str(secret_file(tmp_path / "p", PKCS8)),
        ]
    )
    assert open_module(arguments).public_key_blob == module.public_key_blob
    assert "looks like a private key in PEM; others may know its first line" in capsys.readouterr().err
    secret_file(tmp_path / "p", IDENTITY)
    with pytest.raises(
        ModuleError, match=r"wrong passphrase.*was taken for the passphrase: looks like an age identity"
    ):
        open_module(arguments)


UNKNOWN: dict[str, tuple[bytes, str]] = {
    "a post-quantum identity": (b"AGE-SECRET-KEY-PQ-1QQQQ\n", "post-quantum identities are not supported"),
    "a plugin identity": (b"# serial\nAGE-PLUGIN-YUBIKEY-1QQQQ\n", "age plugins are not supported"),
    "a mark before the key": (f"\ufeff{IDENTITY}".encode(), "byte order mark"),
    "an identity in quotes": (f"'{IDENTITY}'".encode(), "in upper case, without quotes"),
    "an identity in lower case": (IDENTITY.lower().encode(), "in upper case"),
    "a recipient": (RECIPIENT.encode(), "a recipient cannot open a keyring"),
    "an SSH public key": (SSH, "a public key cannot open a keyring"),
    "a mark before PEM": (b"\xef\xbb\xbf" + PKCS8, "byte order mark"),
    "a passphrase": (GOOD.encode(), "sealed to recipients"),
}


@pytest.mark.parametrize(("content", "why"), UNKNOWN.values(), ids=UNKNOWN)
def test_file_without_a_known_identity_is_explained(
    keyring: Path, capsys: pytest.CaptureFixture[str], content: bytes, why: str
) -> None:
    """The file was read as a passphrase, and this keyring is sealed to recipients."""
    path = secret_file(keyring.parent / "pq.key", content)
    run("list", keyring, "--unseal", path, code=1)
    said = capsys.readouterr().err
    assert (
        f"{path} contains no supported identity, so it was taken for a passphrase; this keyring is sealed to recip"
        in said
    )
    assert why in said
    assert IDENTITY not in said
    assert GOOD not in said


NOT_READ: dict[str, tuple[bytes, str]] = {
    "a mark before the comment": (
        f"\ufeff# public key: {RECIPIENT}\n{IDENTITY}\n".encode(),
        "line 1: .*byte order mark",
    ),
    "a mark in UTF-16": (IDENTITY.encode("utf-16"), r"byte order mark \(UTF-16\)"),
    "a plugin identity behind one": (f"{IDENTITY}\nAGE-PLUGIN-YUBIKEY-1QQQQ".encode(), "line 2: .*age plugins"),
    "text behind one": (f"{IDENTITY}\nsome text".encode(), "line 2: "),
    "an armoured age -p file": (
        b"-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n",
        "encrypted identities are not supported",
    ),
    "an age -p file": (b"age-encryption.org/v1\n-> scrypt \xff\xfe", "encrypted identities are not supported"),
    "PKCS#8": (PKCS8, "private key in PEM: `ssh-keygen -p"),
    "a certificate": (b"-----BEGIN CERTIFICATE-----\n", "looks like a certificate"),
}


@pytest.mark.parametrize(("content", "why"), NOT_READ.values(), ids=NOT_READ)
def test_an_identity_that_is_not_read_is_named(
    keyring: Path, capsys: pytest.CaptureFixture[str], content: bytes, why: str
) -> None:
    """The message has the line number of an unsupported identity in a text file."""
    run("list", keyring, "--unseal", secret_file(keyring.parent / "x", content), code=1)
    said = capsys.readouterr().err
    assert re.search(why, said), said
    assert IDENTITY not in said


@program("ssh-keygen", "openssh-client")
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-t", "ecdsa", "-N", ""], "type ecdsa-sha2-nistp256"),
        (
            ["-t", "ed25519", "-N", "secret phrase"],
            "encrypted with a passphrase.*without a passphrase with `ssh-keygen -p`",
        ),
        (["-t", "rsa", "-m", "PEM", "-N", "secret phrase"], "encrypted with a passphrase.*`ssh-keygen -p`"),
        (["-t", "rsa", "-m", "PKCS8", "-N", "secret phrase"], "encrypted with a passphrase.*`ssh-keygen -p`"),
    ],
)
def test_an_ssh_key_that_does_not_open_is_named(
    keyring: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    """The message has the unsupported type of the SSH key, or says that it has a passphrase."""
    subprocess.run(["ssh-keygen", "-q", *arguments, "-f", keyring.parent / "ssh"], check=True)
    run("list", keyring, "--unseal", keyring.parent / "ssh", code=1)
    assert re.search(why, capsys.readouterr().err)


@program("ssh-keygen", "openssh-client")
def test_the_advice_for_an_encrypted_ssh_key_works(tmp_path: Path) -> None:
    """`ssh-keygen -p` writes the form that opens a keyring."""
    key = tmp_path / "ssh"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-m", "PKCS8", "-N", "secret phrase", "-f", key], check=True)
    run("init", tmp_path / "k.age", "--recipient", (tmp_path / "ssh.pub").read_text())
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "secret phrase", "-N", "", "-f", key], check=True)
    run("list", tmp_path / "k.age", "--unseal", key)


def test_an_identity_for_a_passphrase_keyring_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message for each kind of identity says that a passphrase seals the keyring."""
    file.create(tmp_path / "k.age", Document([]), GOOD)
    secret_file(tmp_path / "i", IDENTITY)
    run("list", tmp_path / "k.age", "--unseal", tmp_path / "i", code=1)
    said = capsys.readouterr().err
    assert f"{tmp_path / 'i'} was taken for an age identity; this keyring is sealed to a passphrase" in said
    secret_file(tmp_path / "i", b"AGE-PLUGIN-YUBIKEY-1QQ")
    run("list", tmp_path / "k.age", "--unseal", tmp_path / "i", code=1)
    said = capsys.readouterr().err
    assert "wrong passphrase" in said
    assert "age plugin" in said
    secret_file(tmp_path / "i", "another phrase")
    assert repr(Unsealer.read(tmp_path / "i")) == "Unsealer(passphrase)"
    run("list", tmp_path / "k.age", "--unseal", tmp_path / "i", code=1)
    assert "looks like" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"0", b"\x30\x80", b"\x30\xff\xff", b"-----BEGIN", b"\0" * 9, b"\xff\xfe\0"]
)
def test_resemblance_of_any_bytes_raises_nothing(data: bytes) -> None:
    """Any bytes resemble a known kind of file, or none."""
    assert resemblance(data) is None or str(resemblance(data))
    assert byte_order_mark(data) in (None, "UTF-16")
