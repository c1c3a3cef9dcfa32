"""The main job, step by step, against an agent of its own. Run it with `make demo`.

What a person sees here is what an application does: all of it is public API, except the wiretap, which is there to show
what crossed the socket.
"""

import base64
import hashlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from keyferry import AgentUnavailable, Client
from keyferry.module import DataKey, SoftwareModule
from keyferry.module.interface import DataKeyRecord

MEBIBYTE = 1024 * 1024
CONTEXT = {"tenant": "acme", "purpose": "demo"}


class Wiretap:
    """A relay between an application and the agent that keeps every byte of both directions."""

    def __init__(self, path: Path, agent: Path) -> None:
        self.recorded = bytearray()
        self._agent = agent
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            near, _ = self._listening.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(self._agent))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        while received := source.recv(65_536):
            self.recorded += received
            sink.sendall(received)
        sink.shutdown(socket.SHUT_WR)

    def count(self, needle: bytes) -> int:
        """How often these bytes crossed the socket."""
        return bytes(self.recorded).count(needle)


@contextmanager
def running_agent(path: Path) -> Iterator[None]:
    """Start `keyferry-agent run --dev`, and stop it at the end."""
    log = path.with_suffix(".log")
    with log.open("w") as stderr:
        command = [sys.executable, "-m", "keyferry_agent", "run", "--dev", "--socket", str(path)]
        agent = subprocess.Popen(command, stderr=stderr)
        try:
            ready = [sys.executable, "-m", "keyferry", "status", "--wait", "20", "--socket", str(path)]
            if subprocess.run(ready, stdout=subprocess.DEVNULL, check=False).returncode:
                raise AgentUnavailable(f"the agent did not start:\n{log.read_text()}")
            yield
        finally:
            agent.terminate()
            agent.wait()


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def step(number: int, text: str) -> None:
    """Announce a step."""
    say(f"\n  {number}. {text}")


def fact(text: str) -> None:
    """Print what came out of a step."""
    say(f"       {text}")


def digest(path: Path) -> str:
    """The SHA-256 of a file, shortened for people."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def seal_file(module: SoftwareModule, key: DataKey, source: Path, target: Path) -> None:
    """Encrypt a file inside the module."""
    target.write_bytes(module.encrypt(key, source.read_bytes(), aad=source.name.encode()))


def open_file(module: SoftwareModule, key: DataKey, source: Path, target: Path, name: str) -> None:
    """Decrypt a file inside the module."""
    target.write_bytes(module.decrypt(key, source.read_bytes(), aad=name.encode()))


def main_job(key_spec: str, folder: Path, agent: Path) -> None:
    """Generate and export, store, import, use, lose, recover, use again."""
    wiretap = Wiretap(folder / f"{key_spec}.sock", agent)
    document, sealed, opened = (folder / name for name in ("report.bin", "report.sealed", "report.opened"))
    document.write_bytes(os.urandom(8 * MEBIBYTE))

    with Client(folder / f"{key_spec}.sock") as kms, closing(sqlite3.connect(folder / f"{key_spec}.db")) as database:
        step(1, f"The module makes its own {key_spec} key pair. The private key stays in it.")
        module = SoftwareModule.generate(key_spec)
        fact(f"public key: {module.public_key_blob[:44]}...")

        step(2, "GenerateAndExportDataKey: the agent makes a data key and shows it to nobody.")
        key, record = module.new_data_key(kms, key_id="alias/dev", encryption_context=CONTEXT)
        fact(f"CiphertextBlob, under the master key:    {record['CiphertextBlob'][:24]}...  -> the backup")
        fact(f"ExportedDataKey, under the module's key ({module.wrapping_algorithm}) -> imported, now {key!r}")

        step(3, "The application stores the backup in an SQLite file.")
        database.execute("CREATE TABLE data_keys (name TEXT PRIMARY KEY, record TEXT)")
        database.execute("INSERT INTO data_keys VALUES (?, ?)", ("reports", json.dumps(record)))
        database.commit()
        fact(f"{key_spec}.db: 1 record, no secret in it")

        step(4, f"The module encrypts and decrypts a file of {document.stat().st_size // MEBIBYTE} MiB.")
        seal_file(module, key, document, sealed)
        open_file(module, key, sealed, opened, document.name)
        fact(f"sha256 before {digest(document)}, sealed {digest(sealed)}, after {digest(opened)}")
        assert digest(document) == digest(opened)

        step(5, "The module loses the data key.")
        module.forget(key)
        opened.unlink()

        step(6, "ExportDataKey: the backup from SQLite becomes a fresh ExportedDataKey.")
        ((stored,),) = database.execute("SELECT record FROM data_keys WHERE name = 'reports'")
        recovered: DataKeyRecord = json.loads(stored)
        key = module.recover_data_key(kms, recovered)
        open_file(module, key, sealed, opened, document.name)
        fact(f"sha256 after recovery {digest(opened)}: the same file again")
        assert digest(document) == digest(opened)

    step(7, f"What crossed the socket: {len(wiretap.recorded):,} bytes, all recorded. Was the data key among them?")
    # Only to know what to look for. A real application is not granted kms:Decrypt, and nobody taps this connection.
    with Client(agent) as other:
        plaintext = other.decrypt(ciphertext_blob=record["CiphertextBlob"], encryption_context=CONTEXT).plaintext
    raw = base64.b64decode(plaintext)
    blob = wiretap.count(record["CiphertextBlob"].encode())
    hits = sum(
        wiretap.count(form) for form in (raw, raw.hex().encode(), raw.hex().upper().encode(), plaintext.encode())
    )
    fact(f"the CiphertextBlob {blob} times, once each way; the data key, raw, in hex or in Base64: {hits} times")
    assert blob == 2
    assert hits == 0


def main() -> None:
    """Run the main job with both kinds of modules."""
    say("Keyferry: a data key that nobody sees, made, used, lost and recovered.")
    with tempfile.TemporaryDirectory(prefix="keyferry-demo-") as name:
        folder = Path(name)
        agent = folder / "agent.sock"
        with running_agent(agent):
            say(f"\nkeyferry-agent run --dev is serving: {agent}")
            for key_spec in ("RSA_2048", "EC_SM2"):
                say(f"\n--- with an {key_spec} module " + "-" * 60)
                main_job(key_spec, folder, agent)
    say("\nDone: both data keys came back, and neither was ever seen on the socket.")


if __name__ == "__main__":
    main()
