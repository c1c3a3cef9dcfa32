"""A client that asks an agent for everything it can do, and learns every key that the agent has handled on the way.

It has the private keys of the recipients, and may read the keyring: so it knows every secret that must not be found.
"""

import os
import threading
from pathlib import Path
from typing import Any

from gmssl.sm2 import CryptSM2

from keyferry import Client, operations
from keyferry.parameters import decode_base64, encode_base64
from keyferry_agent.keyring import file
from keyferry_agent.keyring.sealing import Unsealer

from .keys import ALGORITHMS, Recipient, recipient
from .memory_scan import SearchPatterns

KEYS = ("alias/a", "alias/sm4")
SIZES = (32, 16, 100)


class SecretRecorder:
    """Collects the secrets of an agent as search patterns."""

    def __init__(self, keyring: Path) -> None:
        self.patterns = SearchPatterns()
        self.secrets = 0
        self._keyring = keyring
        self._master_keys: dict[str, tuple[str, bytes]] = {}
        self._lock = threading.Lock()
        self.read_keyring()

    def read_keyring(self) -> None:
        """Add the master keys of the keyring."""
        document = file.read(self._keyring, Unsealer.read(self._keyring.parent / "identity"))
        for key in document.keys:
            for version in key.versions:
                self._master_keys[version.version_id] = key.key_spec, bytes(version.material)
                self.patterns.add_key("master key", bytes(version.material))

    def call_every_operation(self, kms: Client, times: int) -> None:
        """Call every operation with every wrapping and key spec, `times` over."""
        for number in range(times):
            key_id, size = KEYS[number % len(KEYS)], SIZES[number % len(SIZES)]
            for algorithm in ALGORITHMS:
                to = recipient(algorithm)
                made = kms.generate_and_export_data_key(key_id=key_id, number_of_bytes=size, **to.arguments)
                data_key = self._exported(to, made.exported_data_key)
                self._sealed(made.key_version_id, made.ciphertext_blob, data_key)
                again = kms.export_data_key(ciphertext_blob=made.ciphertext_blob, **to.arguments)
                self._exported(to, again.exported_data_key)
                moved = kms.re_encrypt(ciphertext_blob=made.ciphertext_blob, destination_key_id=KEYS[1 - number % 2])
                self._sealed(moved.destination_key_version_id, moved.ciphertext_blob, data_key)
            hidden = kms.generate_data_key_without_plaintext(key_id=key_id, number_of_bytes=size)
            opened = kms.decrypt(ciphertext_blob=hidden.ciphertext_blob)
            self._sealed(hidden.key_version_id, hidden.ciphertext_blob, decode_base64(opened.plaintext))
            self.generate_data_key(kms, key_id, size)
            self.encrypt(kms, key_id, 30 * size)

    def generate_data_key(self, kms: Client, key_id: str, size: int = 32) -> None:
        """Call GenerateDataKey, and add its secrets."""
        made = kms.generate_data_key(key_id=key_id, number_of_bytes=size)
        self._sealed(made.key_version_id, made.ciphertext_blob, decode_base64(made.plaintext))

    def encrypt(self, kms: Client, key_id: str, size: int = 32) -> None:
        """Call Encrypt, and add its secrets."""
        plaintext = os.urandom(size)
        sealed = kms.encrypt(key_id=key_id, plaintext=encode_base64(plaintext))
        self._sealed(sealed.key_version_id, sealed.ciphertext_blob, plaintext)

    def run_pipeline(self, kms: Client, times: int) -> None:
        """Send a pipeline of exporting and other calls, and add their secrets."""
        to = recipient(ALGORITHMS[0])
        wanted: list[Any] = []
        for number in range(times):
            wanted += [
                operations.GenerateAndExportDataKey(key_id=KEYS[number % 2], **to.arguments),
                operations.GenerateDataKey(key_id=KEYS[0]),
            ]
        for answer in kms.pipeline(wanted):
            self.learn(to, answer)

    def learn(
        self, to: Recipient, made: operations.GenerateAndExportDataKeyResult | operations.GenerateDataKeyResult
    ) -> None:
        """Add the data key of an answer."""
        if isinstance(made, operations.GenerateDataKeyResult):
            data_key = decode_base64(made.plaintext)
        else:
            data_key = self._exported(to, made.exported_data_key)
        self._sealed(made.key_version_id, made.ciphertext_blob, data_key)

    def _sealed(self, version: str, blob: str, plaintext: bytes) -> None:
        key_spec, master_key = self._master_keys[version]
        with self._lock:
            self.secrets += 1
            self.patterns.add_key("data key" if len(plaintext) <= SIZES[2] else "plaintext", plaintext)
            self.patterns.add_blob(key_spec, master_key, blob, plaintext)

    def _exported(self, to: Recipient, exported: str) -> bytes:
        wrapped = decode_base64(exported)
        with self._lock:
            if to.wrapping_key_spec == "EC_SM2":
                self.patterns.add("SM2 shared point", shared_point(to, wrapped))
            else:
                numbers = to.private.private_numbers()
                encoded = pow(int.from_bytes(wrapped, "big"), numbers.d, numbers.public_numbers.n)
                self.patterns.add("OAEP encoded message", encoded.to_bytes(256, "big"))
        return to.unwrap(exported)


def shared_point(to: Recipient, wrapped: bytes) -> bytes:
    """Return x2 ‖ y2 of an SM2 ciphertext, which derives the data key."""
    der = bytes(to.private.private_der())
    at = der.index(bytes.fromhex("0201010420")) + 5  # the version, and the private key, of the ECPrivateKey in it
    point = CryptSM2(private_key="", public_key="")._kg(int.from_bytes(der[at : at + 32], "big"), wrapped[1:65].hex())
    return bytes.fromhex(point)
