"""The direction of imports, and the modules that map memory and open nurseries. docs/architecture.md draws them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLIENT, AGENT = ROOT / "client" / "keyferry", ROOT / "agent" / "keyferry_agent"
LONGEST = 400


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package, by its dotted name."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
    }


ALL = modules(CLIENT) | modules(AGENT)


def imports(name: str) -> Iterator[str]:
    """The modules that a module imports, wherever in it, with relative names made whole."""
    path = ALL[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in ALL else source


def test_the_client_never_imports_the_agent() -> None:
    """The client is installed without the agent."""
    for name in modules(CLIENT):
        assert not [other for other in imports(name) if other.startswith("keyferry_agent")], name


@pytest.mark.parametrize(
    "room",
    [
        "keyferry.protocol.wire",
        "keyferry.protocol.msgpack_scanner",
        "keyferry.operations",
        "keyferry.parameters",
        "keyferry.errors",
        "keyferry_agent.server.dispatch",
        "keyferry_agent.authz.grants",
        "keyferry_agent.handlers",
        "keyferry_agent.gateway.authentication",
        "keyferry_agent.gateway.answers",
        "keyferry_agent.server.rate_limit",
        "keyferry_agent.crypto",
    ],
)
def test_pure_modules_import_neither_trio_nor_sockets(room: str) -> None:
    """Modules that decide and compute can be tested without an event loop."""
    for name in ALL:
        if name == room or name.startswith(f"{room}."):
            assert not {"trio", "socket", "subprocess"} & {other.split(".")[0] for other in imports(name)}, name


def test_crypto_knows_no_operations_no_keyring_and_no_policy() -> None:
    """Buffers in, bytes out."""
    allowed = (
        "keyferry_agent.crypto",
        "keyferry.secret",
        "keyferry.libcrypto",
        "keyferry.openssl_configuration",
        "keyferry.sm2_ciphertext",
    )
    for name in ALL:
        if name.startswith("keyferry_agent.crypto"):
            inside = [other for other in imports(name) if other.startswith("keyferry")]
            assert all(other.startswith(allowed) for other in inside), (name, inside)


def test_memory_is_mapped_and_nurseries_opened_in_one_module() -> None:
    """Only `secret` maps memory, and only the serving modules open nurseries."""
    texts = {name: path.read_text() for name, path in ALL.items()}
    assert [name for name, text in texts.items() if "mmap" in text] == ["keyferry.secret"]
    nurseries = {name for name, text in texts.items() if "open_nursery" in text}
    assert nurseries == {
        "keyferry_agent.server.server",
        "keyferry_agent.server.connection",
        "keyferry_agent.gateway.server",
        "keyferry_agent.daemon.daemon",
    }
    assert {name for name, text in texts.items() if "ctypes" in text} == {
        "keyferry.secret",
        "keyferry.libcrypto",
        "keyferry.hardening",
        "keyferry.module.cryptoki",
        "keyferry_agent.peer.groups",
    }
    assert {name for name, text in texts.items() if "gmssl" in text and "import" in text and "from gmssl" in text} == {
        "keyferry_agent.crypto.sm2_gmssl"
    }


def test_kinds_of_cryptographic_modules_are_independent() -> None:
    """An installation with one extra does not need the other; only the token package imports PKCS#11."""
    speaking = {name for name in ALL if "pkcs11" in {other.split(".")[0] for other in imports(name)}}
    assert speaking == {f"keyferry.module.{name}" for name in ("cryptoki", "token", "probe", "pkcs11")}
    assert "keyferry.module.software" not in {other for name in speaking for other in imports(name)}
    assert not speaking & set(imports("keyferry.module.software"))


def test_gmssl_encrypts_and_decrypts_nothing() -> None:
    """Only gmssl's curve arithmetic is used, because its own nonce is predictable."""
    for name, path in ALL.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("encrypt", "decrypt") and name.endswith("sm2_gmssl"):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "_curve"), name


def test_modules_have_no_import_cycles() -> None:
    """Modules depend on each other in one direction."""
    graph = {name: {other for other in imports(name) if other in ALL and other != name} for name in ALL}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"in a cycle: {sorted(graph)}"


def test_packages_of_the_agent_depend_in_one_direction() -> None:
    """A package imports packages below it; the top of the agent's package counts as one for each module."""

    def package(name: str) -> str:
        return ".".join(name.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for name in modules(AGENT):
        others = {package(other) for other in imports(name) if other in ALL and other.startswith("keyferry_agent.")}
        graph.setdefault(package(name), set()).update(others - {package(name)})
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"in a cycle: {sorted(graph)}"


def test_databases_are_used_by_the_store_and_its_command_only() -> None:
    """Users of the library have databases of their own."""
    for name in ALL:
        roots = {other.split(".")[0] for other in imports(name)}
        assert not roots & {"sqlalchemy", "psycopg"} or name.startswith("keyferry.store."), name
        assert "tqdm" not in roots or name == "keyferry.command.common", name
        stores = [other for other in imports(name) if other.startswith("keyferry.store")]
        assert not stores or name.startswith(("keyferry.store", "keyferry.command.")), name


def test_files_are_encrypted_over_the_interface_of_modules() -> None:
    """File encryption names no kind of cryptographic module."""
    for name in modules(CLIENT):
        if name.startswith("keyferry.files"):
            known = [other for other in imports(name) if other.startswith("keyferry.module")]
            assert set(known) <= {"keyferry.module.interface"}, name


def test_files_stay_short() -> None:
    """A file over the limit probably holds two ideas."""
    long = {str(path): n for path in ALL.values() if (n := len(path.read_text().splitlines())) > LONGEST}
    assert not long


def test_client_import_loads_only_stdlib_and_msgpack() -> None:
    """An application imports only the modules that it uses."""
    code = "import sys; before = set(sys.modules); import keyferry; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name.split(".")[0] for name in out.split()}
    of_msgpack = {name for name in loaded if "cython" in name}  # types that its compiled half registers
    assert loaded - of_msgpack - sys.stdlib_module_names == {"keyferry", "msgpack"}
