"""ExportedDataKeys from an agent, unwrapped in other languages by the programs that PROTOCOL.md shows."""

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import generate_docs
import pytest
from support import skip_unless
from support.agent import RunningAgent
from support.skip_unless import NODE_MODULES, ROOT, node_module, openssl_sm2, program

from keyferry.sm2_ciphertext import raw_to_der, raw_to_joined

HERE = ROOT / "tests" / "foreign" / "unwrap"
OAEP: tuple[Literal["RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1"], ...] = ("RSAES_OAEP_SHA_256", "RSAES_OAEP_SHA_1")
COMPILERS_PATIENCE = 300.0
"""Seconds. Go compiles its standard library the first time."""
GO = {
    **os.environ,
    "GOTOOLCHAIN": "local",
    "GOPROXY": "off",
    "GOFLAGS": "-mod=readonly -buildvcs=false",
    "CGO_ENABLED": "0",
}
WITH_KEYFERRY = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

java = program("java", "default-jdk-headless")
Command = Callable[[Path], tuple[list[str], dict[str, str]]]


class Exported(NamedTuple):
    """A private key as PKCS#8, and a data key that was exported to it."""

    key: Path
    algorithm: str
    exported: str
    data_key: bytes


def run(arguments: list[str], environment: dict[str, str], exported: str) -> str:
    """Return the output of a program that succeeds."""
    done = subprocess.run(
        arguments,
        input=exported,
        capture_output=True,
        text=True,
        timeout=COMPILERS_PATIENCE,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def export(agent: RunningAgent, folder: Path, spec: Literal["RSA_2048", "EC_SM2"], algorithm: str) -> Exported:
    """A fresh key pair by openssl, and a data key for it."""
    kind = ["RSA", "-pkeyopt", "rsa_keygen_bits:2048"] if spec == "RSA_2048" else ["SM2"]
    pem, key = folder / "key.pem", folder / "key.der"
    subprocess.run(["openssl", "genpkey", "-algorithm", *kind, "-out", str(pem)], check=True, capture_output=True)
    convert = ["openssl", "pkcs8", "-topk8", "-nocrypt", "-in", str(pem), "-outform", "DER", "-out", str(key)]
    subprocess.run(convert, check=True)
    public = subprocess.run(
        ["openssl", "pkey", "-in", str(pem), "-pubout", "-outform", "DER"], capture_output=True, check=True
    )
    with agent.client() as kms:
        made = kms.generate_and_export_data_key(
            key_id="alias/dev",
            public_key_blob=public.stdout,
            wrapping_key_spec=spec,
            wrapping_algorithm=algorithm,
        )
        opened = kms.decrypt(ciphertext_blob=made.ciphertext_blob)
    return Exported(key, algorithm, made.exported_data_key, base64.b64decode(opened.plaintext))


@pytest.fixture(scope="module", params=OAEP)
def rsa(request: pytest.FixtureRequest, agent: RunningAgent, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A data key under RSA, with either hash."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl (Debian package openssl)")
    return export(agent, tmp_path_factory.mktemp("rsa"), "RSA_2048", request.param)


@pytest.fixture(scope="module")
def sm2(agent: RunningAgent, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A data key under SM2."""
    return export(agent, tmp_path_factory.mktemp("sm2"), "EC_SM2", "SM2PKE")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Compiles Go: the path of the program."""

    def build(name: str, arguments: list[str], environment: dict[str, str], folder: Path = HERE) -> str:
        path = tmp_path_factory.mktemp("go") / name
        command = ["go", "build", "-o", str(path), *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(path)

    return build


RSA_PROGRAMS = {
    "Unwrap.java": (["java", str(HERE / "Unwrap.java")], java),
    "unwrap.mjs": (["node", str(HERE / "unwrap.mjs")], program("node", "nodejs")),
    "unwrap.py": ([sys.executable, str(HERE / "unwrap.py")], program("openssl", "openssl")),
    "unwrap.sh": (["sh", str(HERE / "unwrap.sh")], program("openssl", "openssl")),
}


@pytest.mark.parametrize(
    "arguments", [pytest.param(command, marks=mark, id=name) for name, (command, mark) in RSA_PROGRAMS.items()]
)
def test_programs_unwrap_rsa_exports(rsa: Exported, arguments: list[str]) -> None:
    """Each program unwraps exports with SHA-1 and with SHA-256."""
    unwrapped = run([*arguments, str(rsa.key), rsa.algorithm], dict(os.environ), rsa.exported)
    assert base64.b64decode(unwrapped, validate=True) == rsa.data_key


@program("go", "golang-go")
def test_go_unwraps_rsa_exports(rsa: Exported, built: Callable[..., str]) -> None:
    """Go needs only its standard library."""
    path = built("unwrap", [str(HERE / "unwrap.go")], GO)
    assert base64.b64decode(run([path, str(rsa.key), rsa.algorithm], GO, rsa.exported), validate=True) == rsa.data_key


@java
@pytest.mark.parametrize("rsa", OAEP[:1], indirect=True)
def test_javas_sha_256_without_parameters_does_not_unwrap(rsa: Exported) -> None:
    """Java's MGF1 has SHA-1 by default."""
    printed = run(["java", str(HERE / "UnwrapDefault.java"), str(rsa.key)], dict(os.environ), rsa.exported)
    assert printed
    assert printed != "unwrapped"


def in_java(folder: Path) -> tuple[list[str], dict[str, str]]:
    if missing := skip_unless.missing_java(skip_unless.BOUNCY_CASTLE):
        pytest.skip(missing)
    return ["java", "-cp", str(skip_unless.BOUNCY_CASTLE), str(HERE / "UnwrapSm2.java")], dict(os.environ)


def in_node(folder: Path) -> tuple[list[str], dict[str, str]]:
    return ["node", str(HERE / "unwrap_sm2.mjs")], {**os.environ, "NODE_PATH": str(NODE_MODULES)}


def in_go(folder: Path) -> tuple[list[str], dict[str, str]]:
    modules = skip_unless.go_module("github.com/emmansun/gmsm", "v0.15.5")
    environment = {**GO, "GOMODCACHE": str(modules)}
    command = ["go", "build", "-o", str(folder / "unwrap_sm2"), "."]
    done = subprocess.run(command, cwd=HERE / "sm2", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [str(folder / "unwrap_sm2")], environment


def in_shell(folder: Path) -> tuple[list[str], dict[str, str]]:
    return ["sh", str(HERE / "unwrap_sm2.sh")], WITH_KEYFERRY


def key_for(command: Command, exported: Exported, folder: Path) -> str:
    """The private key in the form that a program takes: sm-crypto's is the number in hexadecimal."""
    if command is not in_node:
        return str(exported.key)
    number = exported.key.read_bytes().split(bytes.fromhex("0201010420"))[1][:32]
    (folder / "key.hex").write_text(number.hex())
    return str(folder / "key.hex")


@openssl_sm2()
@pytest.mark.parametrize(
    "command",
    [in_java, pytest.param(in_node, marks=node_module("sm-crypto")), in_go, in_shell],
    ids=lambda c: c.__name__,
)
def test_programs_unwrap_sm2_exports(sm2: Exported, tmp_path: Path, command: Command) -> None:
    """Each program uses the library that the page names."""
    arguments, environment = command(tmp_path)
    unwrapped = run([*arguments, key_for(command, sm2, tmp_path)], environment, sm2.exported)
    assert base64.b64decode(unwrapped, validate=True) == sm2.data_key


@openssl_sm2()
@pytest.mark.parametrize("command", [pytest.param(in_node, marks=node_module("sm-crypto")), in_go])
def test_other_orders_match_the_table_of_forms(sm2: Exported, tmp_path: Path, command: Command) -> None:
    """The table has sm-crypto's mode 0, whose program drops the 04, and emmansun/gmsm's C1C2C3."""
    arguments, environment = command(tmp_path)
    joined = raw_to_joined(base64.b64decode(sm2.exported), order="C1C2C3")
    exported = base64.b64encode(joined).decode()
    unwrapped = run([*arguments, key_for(command, sm2, tmp_path), "C1C2C3"], environment, exported)
    assert base64.b64decode(unwrapped, validate=True) == sm2.data_key


@openssl_sm2()
def test_go_unwraps_der_and_compressed_points(sm2: Exported, tmp_path: Path) -> None:
    """The table of forms lists both for Go."""
    arguments, environment = in_go(tmp_path)
    raw = base64.b64decode(sm2.exported)
    for form in (raw_to_der(raw), raw_to_joined(raw, order="C1C3C2", point="compressed")):
        unwrapped = run([*arguments, str(sm2.key)], environment, base64.b64encode(form).decode())
        assert base64.b64decode(unwrapped, validate=True) == sm2.data_key


@openssl_sm2()
@node_module("sm-crypto")
def test_sm_crypto_program_refuses_damaged_exports(sm2: Exported, tmp_path: Path) -> None:
    """The sm-crypto library itself returns an empty array."""
    arguments, environment = in_node(tmp_path)
    wrapped = bytearray(base64.b64decode(sm2.exported))
    wrapped[-1] ^= 1
    command = [*arguments, key_for(in_node, sm2, tmp_path)]
    damaged = base64.b64encode(wrapped).decode()
    done = subprocess.run(command, input=damaged, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "not exported to this key, or damaged" in done.stderr


def test_every_program_of_the_page_is_run_or_marked_as_not_run() -> None:
    """The page marks .NET as not run, because no test machine has it."""
    run_here = {*RSA_PROGRAMS, "unwrap.go", "UnwrapSm2.java", "unwrap_sm2.mjs", "sm2/unwrap_sm2.go", "unwrap_sm2.sh"}
    titles = {**generate_docs.PROGRAMS_BY_TITLE, **generate_docs.SM2_PROGRAMS_BY_TITLE}
    assert {name for title, name in titles.items() if "not run by any test" not in title} == run_here
