"""An application as it runs in a container of a pod: gets data keys from the agent and uses them, until its input ends.

usage: application.py WRAPPING_KEY_SPEC. Prints events as JSON lines: a new key version, an agent that does not answer, an
agent that answers again; and the totals at the end.
"""

import json
import sys
import threading
import time
from typing import Any

from keyferry import AgentUnavailable, Client, KmsError
from keyferry.module import DataKeyRecord, SoftwareModule

PLAINTEXT = b"what the application has to keep"
KEY = "alias/orders"
RETRY = 0.02
"""Seconds from one attempt to the next without an answer."""


class Application:
    """Generates data keys, encrypts with them, recovers them, and counts the outcomes."""

    def __init__(self, wrapping_key_spec: str) -> None:
        self._module = SoftwareModule.generate(wrapping_key_spec)
        self._oldest: tuple[DataKeyRecord, bytes] | None = None
        self._versions: set[str] = set()
        self._answered = True
        self.sum = {"keys": 0, "recovered": 0, "refused": 0, "wrong": 0}

    def once(self, kms: Client) -> None:
        """One new data key, imported and used; then it, and the very first one, after a loss."""
        try:
            key, record = self._module.new_data_key(
                kms, key_id=KEY, encryption_context={"order": str(self.sum["keys"])}
            )
            self.sum["keys"] += 1
            sealed = self._module.encrypt(key, PLAINTEXT)
            self._module.forget(key)
            self._oldest = self._oldest or (record, sealed)
            for lost, ciphertext in ((record, sealed), self._oldest):
                key = self._module.recover_data_key(kms, lost)
                self.sum["wrong"] += self._module.decrypt(key, ciphertext) != PLAINTEXT
                self._module.forget(key)
                self.sum["recovered"] += 1
        except AgentUnavailable:
            if self._answered:
                self._answered = False
                say(event="unavailable")
            time.sleep(RETRY)
        except KmsError as error:
            self.sum["refused"] += 1
            say(event="refused", code=error.code)
        else:
            if not self._answered:
                self._answered = True
                say(event="answered")
            if record["KeyVersionId"] not in self._versions:
                self._versions.add(record["KeyVersionId"])
                say(event="version", id=record["KeyVersionId"])


def say(**what: Any) -> None:
    """Print one line for the test."""
    print(json.dumps(what), flush=True)


def main(wrapping_key_spec: str) -> None:
    """Work until the input ends."""
    application = Application(wrapping_key_spec)
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    with Client() as kms:
        while not ended.is_set():
            application.once(kms)
    say(event="sum", **application.sum)


if __name__ == "__main__":
    main(*sys.argv[1:])
