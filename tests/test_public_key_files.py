"""Public keys in files: PEM, DER and Base64 are taken; every other form is named, with the command that converts it."""

import subprocess
from base64 import encodebytes
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from support.agent import RunningAgent
from support.keys import rsa_private_key, spki
from support.skip_unless import program

from keyferry import command
from keyferry.operations import OPERATIONS, GenerateAndExportDataKey
from keyferry.parameters import encode_base64
from keyferry.protocol.rpc import Call, pem_to_der
from keyferry_agent.cli.main import main as agent_command
from keyferry_agent.crypto.public_key import fingerprint

PRIVATE = rsa_private_key()
DER = spki(PRIVATE)
PEM = PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
BASE64 = encode_base64(DER).encode()


def private(encoding: Encoding, form: PrivateFormat, *, encrypted: bool = False) -> bytes:
    return PRIVATE.private_bytes(
        encoding, form, BestAvailableEncryption(b"secret phrase") if encrypted else NoEncryption()
    )


def public(encoding: Encoding, form: PublicFormat) -> bytes:
    return PRIVATE.public_key().public_bytes(encoding, form)


TAKEN = {
    "DER": DER,
    "PEM": PEM,
    "PEM with CRLF": PEM.replace(b"\n", b"\r\n"),
    "PEM between empty lines": b"\n\n" + PEM + b"\n\n",
    "Base64 on one line": BASE64 + b"\n",
    "Base64 with CRLF": BASE64 + b"\r\n",
    "Base64 on several lines": encodebytes(DER),
    "what module init prints": b'{\n  "PublicKeyBlob": "%b",\n  "Recipient": "sha256:"\n}\n' % BASE64,
}
REFUSED = {
    "PEM with a byte order mark": (b"\xef\xbb\xbf" + PEM, "begins with a byte order mark (UTF-8)"),
    "PEM in UTF-16": (PEM.decode().encode("utf-16"), "begins with a byte order mark (UTF-16)"),
    "Base64 with a byte order mark": (b"\xef\xbb\xbf" + BASE64, "begins with a byte order mark (UTF-8)"),
    "text before PEM": (b"Public-Key: (2048 bit)\n" + PEM, "text before -----BEGIN PUBLIC KEY-----"),
    "text after PEM": (PEM + b"more\n", "expected one PUBLIC KEY block"),
    "two blocks": (PEM + PEM, "expected one PUBLIC KEY block"),
    "no end": (PEM[:100], "expected one PUBLIC KEY block"),
    "PKCS#1 in PEM": (public(Encoding.PEM, PublicFormat.PKCS1), "openssl rsa -RSAPublicKey_in"),
    "PKCS#1 in DER": (public(Encoding.DER, PublicFormat.PKCS1), "openssl rsa -RSAPublicKey_in"),
    "PKCS#1 in Base64": (encode_base64(public(Encoding.DER, PublicFormat.PKCS1)).encode(), "PKCS#1"),
    "PKCS#1 in a PUBLIC KEY block": (
        b"-----BEGIN PUBLIC KEY-----\n"
        + encodebytes(public(Encoding.DER, PublicFormat.PKCS1))
        + b"-----END PUBLIC KEY-----\n",
        "PKCS#1",
    ),
    "an OpenSSH public key": (
        public(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" root@host\n",
        "ssh-keygen -e -m PKCS8",
    ),
    "a private key in PEM": (private(Encoding.PEM, PrivateFormat.PKCS8), "secret"),
    "a private key in DER": (private(Encoding.DER, PrivateFormat.PKCS8), "secret"),
    "a private key in Base64": (encode_base64(private(Encoding.DER, PrivateFormat.PKCS8)).encode(), "secret"),
    "a PKCS#1 private key": (private(Encoding.PEM, PrivateFormat.TraditionalOpenSSL), "secret"),
    "a PKCS#1 private key in DER": (private(Encoding.DER, PrivateFormat.TraditionalOpenSSL), "secret"),
    "an encrypted private key": (private(Encoding.PEM, PrivateFormat.PKCS8, encrypted=True), "secret"),
    "an encrypted private key in DER": (private(Encoding.DER, PrivateFormat.PKCS8, encrypted=True), "secret"),
    "an OpenSSH private key": (private(Encoding.PEM, PrivateFormat.OpenSSH), "secret"),
    "an age identity": (b"AGE-SECRET-KEY-1QQQQ", "secret"),
    "an age recipient": (b"age1" + b"q" * 58, "age recipient"),
    "an age file": (b"age-encryption.org/v1\n-> X25519 q\n", "age file"),
    "a certificate": (b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "openssl x509"),
    "other JSON": (b'{"Public": "MIIB"}', "PublicKeyBlob"),
    "JSON with a number": (b'{"PublicKeyBlob": 1}', "PublicKeyBlob"),
    "JSON that is cut off": (b'{"PublicKeyBlob": "MIIB', "PublicKeyBlob"),
}


@pytest.mark.parametrize("content", TAKEN.values(), ids=TAKEN)
def test_each_form_of_a_public_key_is_accepted(
    tmp_path: Path, agent: RunningAgent, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """`fingerprint`, @FILE and the arguments of both clients accept each form."""
    assert pem_to_der(content) == DER
    (tmp_path / "key").write_bytes(content)
    assert agent_command(["fingerprint", str(tmp_path / "key")]) == 0
    assert capsys.readouterr().out == f"{fingerprint(DER)}\n"
    arguments = ["--KeyId", "alias/dev", "--WrappingKeySpec", "RSA_2048", "--WrappingAlgorithm", "RSAES_OAEP_SHA_256"]
    arguments += ["--PublicKeyBlob", f"@{tmp_path / 'key'}", "--socket", str(agent.socket)]
    assert command.main(["call", "GenerateAndExportDataKey", *arguments]) == 0
    with agent.client() as kms:
        made = kms.generate_and_export_data_key(
            key_id="alias/dev",
            public_key_blob=content,
            wrapping_key_spec="RSA_2048",
            wrapping_algorithm="RSAES_OAEP_SHA_256",
        )
    assert made.exported_data_key


@pytest.mark.parametrize(("content", "why"), REFUSED.values(), ids=REFUSED)
def test_every_other_form_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, why: str
) -> None:
    """The message has the remedy and no content, and nothing is sent."""
    with pytest.raises(ValueError, match=r"^(it|its|expected) ") as caught:
        pem_to_der(content)
    assert why in str(caught.value)
    path = tmp_path / "key"
    path.write_bytes(content)
    assert agent_command(["fingerprint", str(path)]) == 1
    said = capsys.readouterr().err
    assert said == f"keyferry-agent: {path}: {caught.value}\n"
    with pytest.raises(SystemExit):
        command.main(["call", "GenerateAndExportDataKey", "--PublicKeyBlob", f"@{path}", "--socket", "/nowhere"])
    assert f"--PublicKeyBlob @{path}: {caught.value}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"^(it|its|expected) "):
        Call.of(OPERATIONS["GenerateAndExportDataKey"], request(content))


@pytest.mark.parametrize("text", [PEM.decode(), PEM.decode().replace("\n", "\r\n"), BASE64.decode()])
def test_a_text_argument_is_base64_or_pem(text: str) -> None:
    """Both clients send the Base64 of the DER."""
    call = Call.of(OPERATIONS["GenerateAndExportDataKey"], request(text))
    assert call.params["PublicKeyBlob"] == BASE64.decode()


@pytest.mark.parametrize("text", ["", "AAAA", "not base64!", "a-b_c", "ü", "\udcff", "AAAA-"])
def test_any_other_text_is_sent_as_it_is(text: str) -> None:
    """The agent, not the client, validates other texts."""
    assert Call.of(OPERATIONS["GenerateAndExportDataKey"], request(text)).params["PublicKeyBlob"] == text


@pytest.mark.parametrize("text", ["\ufeff" + PEM.decode(), "ssh-rsa AAAAB3NzaC1yc2E x", "AGE-SECRET-KEY-1QQ"])
def test_a_text_of_another_form_is_named(text: str) -> None:
    """The message is the same as for a file's content."""
    with pytest.raises(ValueError, match=r"byte order mark|SSH public key|age identity"):
        Call.of(OPERATIONS["GenerateAndExportDataKey"], request(text))


def request(blob: str | bytes) -> GenerateAndExportDataKey:
    return GenerateAndExportDataKey("alias/x", blob, "RSA_2048", "RSAES_OAEP_SHA_256")


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\x00", b"MIIB", DER[:-1], DER + b"\0", b"\x30\x03\x02\x01\x00"])
def test_bytes_without_a_known_form_are_sent(content: bytes) -> None:
    """The agent refuses them with its own reason."""
    assert pem_to_der(content) == content


@program("openssl", "openssl")
@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        (public(Encoding.PEM, PublicFormat.PKCS1), ["rsa", "-RSAPublicKey_in", "-pubout"]),
        (private(Encoding.PEM, PrivateFormat.PKCS8), ["pkey", "-pubout"]),
    ],
)
def test_commands_of_the_message_convert_the_key(tmp_path: Path, content: bytes, arguments: list[str]) -> None:
    """The converted file has an accepted form."""
    (tmp_path / "key").write_bytes(content)
    ended = subprocess.run(["openssl", *arguments, "-in", tmp_path / "key"], capture_output=True, check=True)
    assert pem_to_der(ended.stdout) == DER


@program("ssh-keygen", "openssh-client")
def test_command_of_the_message_converts_an_ssh_key(tmp_path: Path) -> None:
    """The converted file has an accepted form."""
    (tmp_path / "key.pub").write_bytes(public(Encoding.OpenSSH, PublicFormat.OpenSSH))
    ended = subprocess.run(
        ["ssh-keygen", "-e", "-m", "PKCS8", "-f", tmp_path / "key.pub"], capture_output=True, check=True
    )
    assert pem_to_der(ended.stdout) == DER
