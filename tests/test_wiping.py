"""Secrets that are overwritten in ordinary memory and in registers: no answer shows whether they are, so tests look."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from support.memory_scan import aes_round_keys
from support.skip_unless import program

from keyferry import age_passphrase, libcrypto, new_files
from keyferry.module import ModuleError, SoftwareModule
from keyferry.protocol import wire
from keyferry.protocol.msgpack_scanner import HeaderScanner
from keyferry_agent.crypto import ciphertext_blob

PASSPHRASE = "correct horse battery"
COST = 4
"""A work factor that takes no time."""
WORD = 8
ROUNDS = 50
Encrypt: TypeAlias = Callable[[memoryview, memoryview], object]


class Buffers:
    """Keeps every bytearray that a module passes to the functions of a library, with its content."""

    def __init__(self) -> None:
        self.kept: list[bytearray] = []
        self.contents: list[bytes] = []

    def watch(self, monkeypatch: pytest.MonkeyPatch, module: object, *names: str) -> None:
        """Watch classes of a module: the arguments of constructors and methods."""
        for name in names:
            monkeypatch.setattr(module, name, self._watched(getattr(module, name)))

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            result = function(*arguments)
            for argument in arguments:
                if isinstance(argument, bytearray):
                    self.kept.append(argument)
                    self.contents.append(bytes(argument))
            methods = ("derive_into", "encrypt", "decrypt_into")
            return _Watching(result, self._watched) if any(hasattr(result, each) for each in methods) else result

        return watched

    @property
    def wiped(self) -> bool:
        """Whether some buffers were seen with content, and none has any now."""
        return any(map(any, self.contents)) and not any(map(any, self.kept))


class _Watching:
    """An object whose methods are watched."""

    def __init__(self, watched: Any, watch: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._object = watched
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return self._watch(getattr(self._object, name))


@pytest.fixture
def buffers(monkeypatch: pytest.MonkeyPatch) -> Buffers:
    """Watch the buffers that the passphrase encryption passes to its library."""
    kept = Buffers()
    kept.watch(monkeypatch, age_passphrase, "Scrypt", "HKDF", "ChaCha20Poly1305")
    return kept


def test_sealing_wipes_every_key_and_the_passphrase(buffers: Buffers) -> None:
    """The encoded passphrase, the keys of wrapping, header and payload, and the file key are wiped."""
    age_passphrase._seal(b"payload", PASSPHRASE, COST)
    assert PASSPHRASE.encode() in buffers.contents
    assert len({content for content in buffers.contents if any(content)}) >= 4
    assert buffers.wiped


@pytest.mark.parametrize("damage", ["none", "passphrase", "header", "content"])
def test_unsealing_wipes_every_key_whether_it_succeeds(buffers: Buffers, damage: str) -> None:
    """Only the returned payload stays."""
    sealed = bytearray(age_passphrase._seal(b"payload", PASSPHRASE, COST))
    buffers.kept.clear()
    buffers.contents.clear()
    if damage == "header":
        at = sealed.index(b"\n---") + 6
        sealed[at] = ord("B" if sealed[at] == ord("A") else "A")  # one bit can make it a character that is not Base64
    if damage == "content":
        sealed[-1] ^= 1
    phrase = "another" if damage == "passphrase" else PASSPHRASE
    if damage == "none":
        assert age_passphrase.unseal(bytes(sealed), phrase) == b"payload"
    else:
        with pytest.raises(age_passphrase.PassphraseError):
            age_passphrase.unseal(bytes(sealed), phrase)
    assert phrase.encode() in buffers.contents
    assert buffers.wiped


def test_unsealing_wipes_chunks_before_a_damaged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first chunk was authentic, and is wiped as well."""
    opened = Buffers()
    size = age_passphrase._CHUNK_SIZE
    sealed = bytearray(age_passphrase._seal(bytes([1]) * (size + 1), PASSPHRASE, COST))
    sealed[-1] ^= 1

    class Opening(bytearray):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened.kept.append(self)

    monkeypatch.setattr(age_passphrase, "bytearray", Opening, raising=False)
    with pytest.raises(age_passphrase.PassphraseError, match="content is damaged"):
        age_passphrase.unseal(bytes(sealed), PASSPHRASE)
    assert max(map(len, opened.kept)) == size + 1
    assert not any(map(any, opened.kept))


# The private key of a software module


@pytest.fixture
def module() -> SoftwareModule:
    """Generate a module of the kind that is generated fastest."""
    return SoftwareModule.generate("EC_SM2")


@pytest.fixture
def ders(monkeypatch: pytest.MonkeyPatch) -> list[bytearray]:
    """Keep the private keys that pass through this process; passphrases cost nothing."""
    kept: list[bytearray] = []

    def keep(function: Callable[..., bytearray]) -> Callable[..., bytearray]:
        def keeping(*arguments: object) -> bytearray:
            kept.append(function(*arguments))
            return kept[-1]

        return keeping

    monkeypatch.setattr(libcrypto.Key, "private_der", keep(libcrypto.Key.private_der))
    monkeypatch.setattr(age_passphrase, "unseal", keep(age_passphrase.unseal))
    monkeypatch.setattr(age_passphrase, "WORK_FACTOR", COST)
    return kept


def test_a_saved_private_key_is_wiped(tmp_path: Path, module: SoftwareModule, ders: list[bytearray]) -> None:
    """The buffer that is sealed is wiped, and the one that a file is unsealed into."""
    module.save(tmp_path / "module", PASSPHRASE)
    loaded = SoftwareModule.load(tmp_path / "module", PASSPHRASE)
    assert loaded.public_key_blob == module.public_key_blob
    assert [len(der) > 100 for der in ders] == [True, True]
    assert not any(map(any, ders))


def test_a_private_key_that_is_not_saved_is_wiped(
    tmp_path: Path, module: SoftwareModule, ders: list[bytearray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving fails for lack of scrypt's memory, or because the file cannot be written."""

    def short(*_: object) -> bytes:
        raise age_passphrase.PassphraseError("not enough memory")

    with pytest.raises(OSError, match="No such file"):
        module.save(tmp_path / "none" / "module", PASSPHRASE)
    monkeypatch.setattr(age_passphrase, "seal", short)
    with pytest.raises(ModuleError, match="not enough memory"):
        module.save(tmp_path / "module", PASSPHRASE)
    assert len(ders) == 2
    assert not any(map(any, ders))


def test_a_file_that_is_not_a_module_is_wiped(tmp_path: Path, ders: list[bytearray]) -> None:
    """The file's content may be another secret."""
    new_files.create(tmp_path / "other", age_passphrase._seal(b"another secret", PASSPHRASE, COST))
    with pytest.raises(ModuleError, match="not a module file"):
        SoftwareModule.load(tmp_path / "other", PASSPHRASE)
    assert [len(der) for der in ders] == [len(b"another secret")]
    assert not any(map(any, ders))


# Messages


@pytest.mark.parametrize("scanner", [None, HeaderScanner(wire.MAX_ARRAY)], ids=["whole", "in pieces"])
def test_a_decoded_message_is_zeros_in_the_buffer(scanner: HeaderScanner | None) -> None:
    """An answer may hold a plaintext. The buffer is not moved, because another message has begun behind it."""
    message = wire.encode_response(1, None, {"Plaintext": "secret" * 20})
    behind = wire.encode_response(2, None, {"Plaintext": "x" * 2_000})[:-1]
    decoder = wire.Decoder()
    decoder.feed(message + behind)
    shown = (ctypes.c_char * len(message)).from_buffer(decoder._buffer)
    address = ctypes.addressof(shown)
    assert ctypes.string_at(address, len(message)) == message
    del shown
    decoder._scanner = scanner
    (decoded,) = decoder.messages()
    assert decoded == wire.Response(1, None, {"Plaintext": "secret" * 20})
    assert ctypes.string_at(address, len(message)) == bytes(len(message))


# Registers


@pytest.fixture(scope="session")
def registers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], bytes]:
    """Return a function that returns the content of this thread's vector registers."""
    library, source = tmp_path_factory.mktemp("registers") / "libregisters.so", Path(__file__).parent / "support"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(source / "registers.c")]
    subprocess.run(command, check=True)
    room = (ctypes.c_ubyte * 2_048)()
    copy = ctypes.CDLL(str(library)).registers
    copy.argtypes = [ctypes.c_void_p]
    address = ctypes.addressof(room)
    return lambda: bytes(room[: copy(address)])


def leaves(encrypt: Encrypt, registers: Callable[[], bytes]) -> int:
    """Return after how many of ROUNDS encryptions a part of their key, or of its round keys, is in a register."""
    found = 0
    for _ in range(ROUNDS):
        key = os.urandom(32)
        keys = key + aes_round_keys(key)
        plaintext, lent = memoryview(bytearray(os.urandom(32))), memoryview(bytearray(key))
        encrypt(lent, plaintext)
        content = registers()
        windows = {keys[at : at + WORD] for at in range(0, len(keys), WORD)}
        windows |= {window[::-1] for window in windows} | {
            bytes(plaintext[at : at + WORD]) for at in range(0, 32, WORD)
        }
        found += any(content[at : at + WORD] in windows for at in range(0, len(content), WORD))
    return found


@program("gcc", "gcc")
def test_no_round_key_stays_in_a_register(registers: Callable[[], bytes]) -> None:
    """Encryption and decryption leave none; the AES library alone does, which shows that the search works."""
    nonce, sealed = bytes(12), bytearray(48)

    def opening(key: memoryview, plaintext: memoryview) -> None:
        sealed[:] = AESGCM(key).encrypt(nonce, plaintext, b"")
        ciphertext_blob._aes_decrypt_into(key, memoryview(sealed), b"", memoryview(bytearray(len(plaintext))))

    assert leaves(lambda key, plaintext: ciphertext_blob._aes_encrypt(key, plaintext, b""), registers) == 0
    assert leaves(opening, registers) == 0
    if not leaves(lambda key, plaintext: AESGCM(key).encrypt(nonce, plaintext, b""), registers):
        pytest.skip("needs a processor with which OpenSSL's AES leaves round keys in registers (AVX-512)")
