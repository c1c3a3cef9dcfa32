"""OpenSSL configurations without some algorithms: the lack is named, and no caller is blamed for it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from support.agent import PATIENCE, RawConnection, RunningAgent
from support.calls import call_ok, call_refused
from support.keys import recipient
from support.secrets import secret_file

from keyferry import age_passphrase, libcrypto, openssl_configuration
from keyferry.module import ModuleError, SoftwareModule
from keyferry.parameters import encode_base64
from keyferry.secret import SecretMemory
from keyferry_agent.crypto import selftest, wrapping

PROVIDER = "openssl_conf = init\n[init]\nproviders = p\n[p]\n{name} = on\n[on]\nactivate = 1\n"
PROPERTIES = "openssl_conf = init\n[init]\nalg_section = a\n[a]\ndefault_properties = {query}\n"
BROKEN = {
    "no default provider": PROVIDER.format(name="null"),
    "the base provider only": PROVIDER.format(name="base"),
    "the legacy provider only": PROVIDER.format(name="legacy"),
    "FIPS only": PROVIDER.format(name="fips"),
    "FIPS by properties": PROPERTIES.format(query="fips=yes"),
    "another provider by properties": PROPERTIES.format(query="provider=legacy"),
    "a provider that there is not": PROPERTIES.format(query="provider=none"),
}
GOOD = {
    "the default provider": PROVIDER.format(name="default"),
    "FIPS where there is some": PROPERTIES.format(query="?fips=yes"),
    "an empty file": "",
    "no syntax": "garbage [[",
}


def environment(folder: Path, text: str) -> dict[str, str]:
    (folder / "openssl.cnf").write_text(text)
    return {**os.environ, "OPENSSL_CONF": str(folder / "openssl.cnf")}


def ended(arguments: list[object], where: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """One command of either program, in a process of its own."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, env=where, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.fixture(params=list(BROKEN.values()), ids=list(BROKEN))
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """An environment with an OpenSSL configuration that offers no RSA."""
    return environment(tmp_path, request.param)


def only_line(process: "subprocess.CompletedProcess[str]") -> str:
    """Return the message of a failed command."""
    assert process.returncode == 1
    assert process.stdout == ""
    (line,) = [line for line in process.stderr.splitlines() if not line.startswith("{")]
    return line


def test_an_agent_without_rsa_does_not_start(broken: dict[str, str], tmp_path: Path) -> None:
    """One line names the configuration and the missing algorithm."""
    arguments = ["keyferry_agent", "run", "--dev", "--socket", tmp_path / "agent.sock"]
    line = only_line(ended(arguments, broken))
    assert f"OPENSSL_CONF={broken['OPENSSL_CONF']}" in line
    assert "does not offer RSA" in line or "does not offer id-aes256-GCM" in line
    assert "built without" not in line
    assert "github" not in line


@pytest.mark.parametrize("key_spec", ["RSA_2048", "EC_SM2"])
def test_a_module_is_not_made_without_its_algorithm(broken: dict[str, str], tmp_path: Path, key_spec: str) -> None:
    """The message is one line, and neither a module nor a passphrase file is made."""
    arguments = ["keyferry", "module", "init", tmp_path / "m", "--key-spec", key_spec]
    line = only_line(ended([*arguments, "--generate-passphrase", "--passphrase-file", tmp_path / "p"], broken))
    assert f"this OpenSSL's configuration does not offer {'RSA' if key_spec == 'RSA_2048' else 'SM2'} " in line
    assert f"OPENSSL_CONF={broken['OPENSSL_CONF']}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["openssl.cnf"]


@pytest.fixture(scope="module")
def module_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A module in a file."""
    path = tmp_path_factory.mktemp("module") / "m"
    SoftwareModule.generate().save(path, "correct horse battery")
    return path


def test_a_module_that_does_not_load_names_the_configuration(
    broken: dict[str, str], module_file: Path, tmp_path: Path
) -> None:
    """It is a module file, and the passphrase is right."""
    secret_file(tmp_path / "p", "correct horse battery\n")
    (tmp_path / "in").write_bytes(b"x")
    module = ["--module", module_file, "--passphrase-file", tmp_path / "p", "--record", "r"]
    store = ["--store", f"sqlite:///{tmp_path}/s.db"]
    line = only_line(ended(["keyferry", "encrypt-file", tmp_path / "in", tmp_path / "out", *module, *store], broken))
    assert f"OPENSSL_CONF={broken['OPENSSL_CONF']}" in line or "no record" in line
    code = "import sys; from keyferry.module import SoftwareModule; SoftwareModule.load(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(module_file), "correct horse battery"]
    process = subprocess.run(command, env=broken, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert process.stderr.splitlines()[-1].startswith("keyferry.module.interface.ModuleError: ")
    assert f"OPENSSL_CONF={broken['OPENSSL_CONF']}" in process.stderr
    assert "not enough memory" not in process.stderr


def test_other_commands_need_no_openssl(broken: dict[str, str]) -> None:
    """`status` and `--help` of the client work with a broken OpenSSL configuration."""
    assert ended(["keyferry", "--help"], broken).returncode == 0
    assert "does not exist" in ended(["keyferry", "status", "--socket", "/no/such.sock"], broken).stderr


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_a_configuration_that_offers_all_serves(text: str, tmp_path: Path, socket_path: Path) -> None:
    """The agent logs no warning about an algorithm."""
    with RunningAgent(["--dev"], socket_path, environment=environment(tmp_path, text)) as agent:
        with RawConnection(agent.socket) as connection:
            call_ok(connection, "GenerateAndExportDataKey", exporting("RSAES_OAEP_SHA_256"))
        assert not [line for line in agent.output if "RSAES" in line or "Aliyun" in line]


# OpenSSL's own providers offer these together only, so a process without one of them shows the case.
WITHOUT = """
import sys
from keyferry import libcrypto
lacking = sys.argv.pop(1).split(",")
has_oaep = libcrypto.has_oaep
if "SM2" in lacking:
    libcrypto.has_sm2 = lambda: False
if "SHA-1" in lacking:
    libcrypto.has_oaep = lambda digest: digest != b"sha1" and has_oaep(digest)
if "keys" in lacking:
    def refuse(der):
        raise libcrypto.LibcryptoError("libcrypto does not accept this public key")
    libcrypto.public_key = lambda der, load=libcrypto.public_key: refuse(der) if der[-10:-6] == bytes(4) else load(der)
if "SM4" in lacking:
    from cryptography.exceptions import UnsupportedAlgorithm
    from keyferry_agent.crypto import ciphertext_blob
    def refuse(*_):
        raise UnsupportedAlgorithm("cipher sm4 in GCM mode is not supported")
    ciphertext_blob._SUITES["Aliyun_SM4"] = ciphertext_blob._SUITES["Aliyun_SM4"]._replace(encrypt=refuse, decrypt_into=refuse)
from keyferry_agent.cli.main import main
sys.exit(main())
"""


def without(lacking: str, socket: Path) -> RunningAgent:
    """An agent, to be entered, on a system that lacks some algorithms."""
    return RunningAgent(["--dev"], socket, command=("-c", WITHOUT, lacking))


def exporting(algorithm: str) -> dict[str, Any]:
    """A request that exports a data key."""
    return {"KeyId": "alias/dev", **recipient(algorithm).params}


@pytest.mark.parametrize(("lacking", "algorithm"), [("SM2", "SM2PKE"), ("SHA-1", "RSAES_OAEP_SHA_1")])
def test_an_algorithm_that_is_not_offered_is_unsupported(lacking: str, algorithm: str, socket_path: Path) -> None:
    """The log says so at the start, with the configuration; a caller is told that the operation is not supported."""
    with without(lacking, socket_path) as agent, RawConnection(agent.socket) as connection:
        event = agent.wait_for("startup.limited")
        assert event["what"].startswith(
            f"{algorithm} is not available without {lacking}: this OpenSSL's configuration does not offer {lacking} (OpenSSL 3."
        )
        assert "OPENSSL_CONF" in event["what"]
        why = f"{algorithm} is not available without {lacking}: this OpenSSL's configuration does not offer {lacking}."
        call_refused(connection, "GenerateAndExportDataKey", exporting(algorithm), "UnsupportedOperation", why)
        call_ok(connection, "GenerateAndExportDataKey", exporting("RSAES_OAEP_SHA_256"))


def test_algorithm_of_a_key_spec_may_be_unsupported(socket_path: Path) -> None:
    """Keys of the other KeySpec are served."""
    with without("SM4", socket_path) as agent, RawConnection(agent.socket) as connection:
        assert agent.wait_for("startup.limited")["what"].startswith("Aliyun_SM4: ")
        call_refused(connection, "GenerateDataKey", {"KeyId": "alias/dev-sm4"}, "UnsupportedOperation", "KeySpec")
        call_ok(connection, "GenerateDataKey", {"KeyId": "alias/dev"})


def test_failure_of_libcrypto_is_not_the_callers_fault(socket_path: Path) -> None:
    """A good public key that libcrypto refuses is an InternalFailure, which a client retries."""
    prefix, suffix = (
        bytes.fromhex("30820122300d06092a864886f70d01010105000382010f003082010a0282010100"),
        bytes.fromhex("0203010001"),
    )
    der = prefix + (2**2047 + 1).to_bytes(256, "big") + suffix
    request = {**exporting("RSAES_OAEP_SHA_256"), "PublicKeyBlob": encode_base64(der)}
    with without("keys", socket_path) as agent, RawConnection(agent.socket) as connection:
        call_refused(connection, "GenerateAndExportDataKey", request, "InternalFailure")
        call_ok(connection, "GenerateAndExportDataKey", exporting("RSAES_OAEP_SHA_256"))


def test_build_is_named_if_the_configuration_is_complete() -> None:
    """No OpenSSL has an algorithm of this name."""
    assert libcrypto.why_missing("NONE") == "this system's libcrypto was built without NONE"
    assert libcrypto.why_missing("SHA-0") == "this system's libcrypto was built without SHA-0"
    assert libcrypto.why_missing("RSA") == "this OpenSSL's configuration does not offer RSA"
    assert (libcrypto.offers("RSA"), libcrypto.offers("NONE")) == (True, False)


def test_unset_configuration_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's configuration file is in effect."""
    monkeypatch.setenv("OPENSSL_CONF", "/etc/other.cnf")
    assert openssl_configuration.configuration() == "OPENSSL_CONF=/etc/other.cnf"
    monkeypatch.delenv("OPENSSL_CONF")
    assert openssl_configuration.configuration().startswith("OPENSSL_CONF is not set: ")


@pytest.mark.parametrize("error", [UnsupportedAlgorithm("no scrypt"), InternalError("Unknown OpenSSL error", [])])
def test_passphrase_without_its_algorithms_has_its_own_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Sealing and opening name the configuration."""
    sealed = age_passphrase._seal(b"x", "phrase", 10)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(age_passphrase, "Scrypt", fail)
    with pytest.raises(age_passphrase.PassphraseError, match="OPENSSL_CONF"):
        age_passphrase.unseal(sealed, "phrase")
    with pytest.raises(age_passphrase.PassphraseError, match="OPENSSL_CONF"):
        age_passphrase.seal(b"x", "phrase")


def test_scrypt_that_is_not_offered_is_not_short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reports both as a MemoryError. Without scrypt's hash, the configuration is the reason."""

    def short(*_: object) -> None:
        raise MemoryError

    def unsupported(*_: object) -> None:
        raise UnsupportedAlgorithm("SHA-256")

    sealed = age_passphrase._seal(b"x", "phrase", 10)
    monkeypatch.setattr(age_passphrase, "Scrypt", short)
    with pytest.raises(age_passphrase.PassphraseError, match="not enough memory"):
        age_passphrase.unseal(sealed, "phrase")
    monkeypatch.setattr(age_passphrase, "HKDF", unsupported)
    with pytest.raises(age_passphrase.PassphraseError, match="offers no SHA-256 for scrypt"):
        age_passphrase.unseal(sealed, "phrase")


def test_errors_of_other_packages_are_not_openssls() -> None:
    """They keep their tracebacks."""
    assert openssl_configuration.cryptography_failure(ImportError("no module named x")) is None
    assert openssl_configuration.cryptography_failure(ValueError("OpenSSL")) is None
    assert "legacy" in str(
        openssl_configuration.cryptography_failure(RuntimeError("OpenSSL 3's legacy provider failed to load."))
    )


def test_a_self_test_without_aes_names_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """RSA and AES are needed; other algorithms are limits."""

    def fail(*_: object) -> None:
        raise UnsupportedAlgorithm("AES")

    monkeypatch.setattr(selftest, "_check_seal", fail)
    with pytest.raises(selftest.SelfTestError, match=r"Aliyun_AES_256: .*OPENSSL_CONF"):
        selftest.run(SecretMemory(8192, require=False), sm2_fallback=False)


def test_recipients_are_unavailable_without_rsa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RSA in libcrypto, an RSA key is not accepted as a recipient."""
    monkeypatch.setattr(libcrypto, "has_oaep", lambda _digest: False)
    wrapping.recipient.cache_clear()
    way = wrapping.TABLE["RSA_2048", "RSAES_OAEP_SHA_1"]
    with pytest.raises(wrapping.WrappingError, match="does not offer RSA"):
        wrapping.recipient(way, recipient("RSAES_OAEP_SHA_1").der, sm2_fallback=True)


def test_damaged_module_file_is_named(tmp_path: Path) -> None:
    """With a complete libcrypto, the message does not blame the OpenSSL configuration."""
    secret_file(tmp_path / "m", age_passphrase._seal(b"not a key", "correct horse battery", 10))
    with pytest.raises(ModuleError, match="not a module file"):
        SoftwareModule.load(tmp_path / "m", "correct horse battery")
