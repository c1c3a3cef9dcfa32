"""The programs of tests/foreign/sdk, which call a gateway with the cloud's unmodified SDKs, in processes of their own."""

import json
import os
import queue
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import pytest

from .agent import PATIENCE
from .gateway import Credentials, Prepared
from .skip_unless import ROOT

SDKS: Final = ROOT / ".cache" / "sdk"
"""Where .ci/sdks puts the SDKs."""
PROGRAMS: Final = ROOT / "tests" / "foreign" / "sdk"
PYTHON: Final = SDKS / "python" / "bin" / "python"
NODE_MODULES: Final = SDKS / "node" / "node_modules"
JAVA: Final = SDKS / "java"
GO: Final = SDKS / "go"
PROVIDE: Final = "which .ci/sdks installs"
EVERY: Final = frozenset(
    {
        *("GenerateAndExportDataKey", "ExportDataKey", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext"),
        *("Encrypt", "Decrypt", "ReEncrypt", "DescribeKey", "ListKeys", "ListKeyVersions", "ListAliases"),
    }
)
"""The operations of a gateway."""
ALGORITHMS: Final = ("v2", "ACS3-HMAC-SHA256", "ACS3-HMAC-SM3")
"""Values of a V2 SDK's signature algorithm. Its `v2` is signature version 1."""


class SdkError(Exception):
    """An error that the SDK raised. The attributes are what its exception has; an empty text where it has none."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        super().__init__(str(error))
        self.code = str(error.get("Code") or "")
        self.http_status = error.get("HttpStatus")
        self.message = str(error.get("Message") or "")
        self.request_id = str(error.get("RequestId") or "")


@dataclass(frozen=True)
class Kind:
    """A program. `needs`: a file that is there if the SDK is installed.

    `operations`: those that the SDK has. `algorithms`: the ways it can sign. `retries`: whether it can repeat a call.
    `uses_proxy`: whether it takes a proxy from the environment, also for this host and against NO_PROXY.
    `ca_variable`: the environment variable that names the authority, where no setting does.
    """

    name: str
    command: Sequence[str]
    needs: Path
    operations: frozenset[str] = EVERY
    algorithms: Sequence[str] = ("",)
    retries: bool = False
    uses_proxy: bool = False
    has_dry_run: bool = True
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    ca_variable: str = ""

    @property
    def missing(self) -> str | None:
        """Why a test with the program has to be skipped; None if all is there."""
        if self.needs.exists() and shutil.which(self.command[0]) is not None:
            return None
        return f"needs {self.needs.relative_to(ROOT)}, {PROVIDE}, and {Path(self.command[0]).name}"

    def param(self) -> Any:
        """Return the parameter of a test, which skips where the SDK is missing."""
        return pytest.param(self, id=self.name, marks=pytest.mark.skipif(bool(self.missing), reason=str(self.missing)))


def _python(name: str, module: str, *arguments: str, algorithms: Sequence[str] = ("",), retries: bool = False) -> Kind:
    command = [str(PYTHON), "-W", "ignore", "-m", f"foreign.sdk.{module}", *arguments]
    environment = {"PYTHONPATH": str(ROOT / "tests")}
    needs = SDKS / "python" / "requirements.txt"
    return Kind(
        name,
        command,
        needs,
        algorithms=algorithms,
        retries=retries,
        uses_proxy=True,
        environment=environment,
    )


def _node(
    name: str,
    operations: frozenset[str] = EVERY,
    *,
    ca_variable: str = "",
    algorithms: Sequence[str] = ("",),
) -> Kind:
    return Kind(
        f"node-{name}",
        ["node", str(PROGRAMS / "sdk.cjs"), name],
        NODE_MODULES / "@alicloud" / name.removesuffix("-post"),
        operations=operations,
        environment={"NODE_PATH": str(NODE_MODULES)},
        ca_variable=ca_variable,
        algorithms=algorithms,
        has_dry_run=name != "kms20160120",
    )


_NODE_CA: Final = "NODE_EXTRA_CA_CERTS"
_NOT_IN_NODE_KMS: Final = frozenset({"GenerateAndExportDataKey", "ExportDataKey", "ReEncrypt"})
SCRIPTS: Final = [
    _python("python-v2", "v2", "sync", algorithms=ALGORITHMS, retries=True),
    _python("python-v2-async", "v2", "async", algorithms=ALGORITHMS),
    _python("python-classic", "classic"),
    _node("openapi-core", algorithms=ALGORITHMS),
    _node("openapi-client", algorithms=ALGORITHMS),
    _node("pop-core", ca_variable=_NODE_CA),
    _node("pop-core-post", ca_variable=_NODE_CA),
    _node("kms20160120", EVERY - _NOT_IN_NODE_KMS, ca_variable=_NODE_CA),
]
"""The programs that need no compiler."""
JAVA_SDK: Final = Kind(
    "java-v2",
    ["java", "-cp", f"{JAVA}/*", str(PROGRAMS / "java" / "Sdk.java")],
    JAVA,
    algorithms=ALGORITHMS,
    retries=True,
)


def python_sdks() -> pytest.MarkDecorator:
    """Skip without the SDKs for Python."""
    return pytest.mark.skipif(bool(SCRIPTS[0].missing), reason=str(SCRIPTS[0].missing))


class Sdk:
    """A running program. Use `client` before `call`."""

    def __init__(self, kind: Kind, prepared: Prepared, ca: Path | None = None) -> None:
        """`ca`: another authority to trust than that of the gateway."""
        self.kind = kind
        self.prepared = prepared
        self.ca = ca or prepared.ca
        removed = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", _NODE_CA)
        environment = {name: value for name, value in os.environ.items() if name.upper() not in removed}
        environment |= kind.environment
        if kind.ca_variable:
            environment[kind.ca_variable] = str(self.ca)
        self._process = subprocess.Popen(
            kind.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if kind is JAVA_SDK else None,  # its logging library writes that it is missing
            text=True,
            env=environment,
            cwd=kind.folder,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        try:
            line = self._lines.get(timeout=PATIENCE)
        except queue.Empty:
            pytest.fail(f"{self.kind.name} has not answered in {PATIENCE:g} s: {asked}")
        assert line, f"{self.kind.name} has ended before its answer to {asked}"
        outcome = json.loads(line)
        if "error" in outcome:
            raise SdkError(outcome["error"])
        return dict(outcome["result"])

    def client(
        self,
        protocol: str,
        credentials: Credentials | None = None,
        *,
        port: int = 0,
        algorithm: str = "",
        attempts: int = 0,
    ) -> None:
        """Have the program use a new client from now on."""
        credentials = credentials or self.prepared.credentials
        settings: dict[str, Any] = {
            "access_key_id": credentials.access_key_id,
            "access_key_secret": credentials.secret,
            "host": f"127.0.0.1:{port or self.prepared.port(protocol)}",
            "protocol": protocol,
            "ca": str(self.ca),
        }
        optional = {"security_token": credentials.token, "signature_algorithm": algorithm, "attempts": attempts}
        self._ask({"client": settings | {name: value for name, value in optional.items() if value}})

    def call(self, action: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of an action. Raises `SdkError`."""
        return self._ask({"action": action, "parameters": parameters})

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._reader.join(PATIENCE)
            self._process.stdout.close()
            self._process.wait()


@contextmanager
def running(kind: Kind, prepared: Prepared, ca: Path | None = None) -> Iterator[Sdk]:
    """Run a program."""
    sdk = Sdk(kind, prepared, ca)
    try:
        yield sdk
    finally:
        sdk.close()


def build_go(source: Path, program: Path) -> None:
    """Build a program in Go, with the modules of tests/foreign/sdk/go; skips where Go or the modules are missing."""
    module = GO / "github.com" / "alibabacloud-go" / "kms-20160120"
    if shutil.which("go") is None or not module.exists():
        pytest.skip(f"needs {module.relative_to(ROOT)}, {PROVIDE}, and go")
    environment = {
        **os.environ,
        "GOMODCACHE": str(GO),
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=readonly -modcacherw -buildvcs=false",
    }
    modfile = f"-modfile={PROGRAMS / 'go' / 'go.mod'}"
    subprocess.run(
        ["go", "build", modfile, "-o", str(program), str(source)], cwd=PROGRAMS / "go", env=environment, check=True
    )


def built_go(folder: Path) -> Kind:
    """Build the program in Go in a folder, and return its kind; skips where Go or its modules are missing."""
    program = folder / "sdk"
    build_go(PROGRAMS / "go" / "sdk.go", program)
    return replace(JAVA_SDK, name="go-v2", command=[str(program)], needs=program, uses_proxy=True)


class LossyRelay:
    """Relays connections to a port of this host. It discards the first `lose` answers, and closes their connections."""

    def __init__(self, port: int, lose: int) -> None:
        self._target = port
        self._lose = lose
        self.accepted = 0
        self.lost = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target), PATIENCE) as server:
            client.settimeout(PATIENCE)
            try:
                while data := client.recv(65_536):
                    server.sendall(data)
                    answer = server.recv(65_536)
                    if self.lost < self._lose:
                        self.lost += 1
                        return
                    client.sendall(answer)
            except OSError:
                return

    def close(self) -> None:
        """Accept no further connections."""
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE)
