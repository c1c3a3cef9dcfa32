"""Looks for key bytes in the memory of another process, in core dumps and in swap files.

Each form in which a library may keep a named secret becomes search patterns: windows of eight bytes. Memory is read as
aligned words of eight bytes. So every copy of fifteen bytes or more is found at any address, and every aligned fragment of
eight.

Eight hexadecimal digits are 32 bits only, and memory is full of others' digits: RequestIds, hashes. Of 100,000 windows, some
would be found by chance. So digits are found where two words follow each other: in every copy of 23 digits or more.
"""

import base64
import functools
import itertools
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from Cryptodome.Cipher import AES
from gmssl.sm4 import SM4_ENCRYPT, CryptSM4
from reference.blob_decoder import SUITES, _hkdf

from keyferry.parameters import decode_base64

_WORD = 8
_CHUNK = 1 << 22
_BYTES_IN_DIGITS = 100
"""Bytes at the beginning of a long secret that are searched for in digits."""


class SearchPatterns:
    """The secrets to search for, by their eight-byte windows."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._pairs: dict[int, str] = {}
        """Of digits: two words that follow each other."""
        self._firsts: set[int] = set()
        """The first words of the pairs."""

    def __len__(self) -> int:
        return len(self._names) + len(self._pairs)

    def add(self, name: str, secret: bytes) -> None:
        """Add one form of a secret, eight bytes or longer, in either byte order."""
        for form, text in _forms(name, secret):
            for at in range(len(text) - _WORD + 1):
                window = text[at : at + _WORD]
                if len(set(window)) > 3:  # uniform bytes occur everywhere
                    self._names[_number(window)] = form

    def add_digits(self, name: str, digits: str) -> None:
        """Add a secret that is written in hexadecimal digits, 16 or more, in either byte order."""
        for form, text in _forms(name, digits.encode()):
            for at in range(len(text) - 2 * _WORD + 1):
                window = text[at : at + 2 * _WORD]
                if len(set(window)) > 3:
                    self._pairs[_number(window)] = form
                    self._firsts.add(_number(window[:_WORD]))

    def add_key(self, name: str, key: bytes) -> None:
        """Seek a key: raw, as text, and as the round keys that ciphers make of it."""
        self.add(name, key)
        digits = key[:_BYTES_IN_DIGITS].hex()
        self.add_digits(f"{name} in hex", digits)
        self.add_digits(f"{name} in HEX", digits.upper())
        self.add(f"{name} in Base64", base64.b64encode(key))
        if len(key) in (16, 24, 32):
            self.add(f"{name} as AES round keys", aes_round_keys(key))
            self.add(f"{name} as GHASH key", AES.new(key, AES.MODE_ECB).encrypt(bytes(16)))
        if len(key) == 16:
            self.add(f"{name} as SM4 round keys", sm4_round_keys(key))

    def add_blob(self, key_spec: str, cmk: bytes, blob: str, plaintext: bytes) -> None:
        """Add the secrets that sealed a CiphertextBlob: the one-time key and the keystream."""
        raw = decode_base64(blob)
        suite, salt, sealed = SUITES[key_spec], raw[37:69], raw[101:-16]
        self.add("HKDF's pseudorandom key", suite.hmac(salt, cmk))
        self.add_key("one-time key", _hkdf(suite, cmk, salt, suite.key_size))
        self.add("keystream", bytes(a ^ b for a, b in zip(sealed, plaintext, strict=True)))

    def add_oaep(self, encoded: bytes) -> None:
        """Add an OAEP encoded message, which contains the data key."""
        self.add("OAEP encoded message", encoded)

    def in_words(self, data: bytes) -> Counter[str]:
        """Return the names of patterns in memory that begins at an aligned address, with their counts."""
        words = memoryview(data[: len(data) // _WORD * _WORD]).cast("Q")
        there = set(words)
        found = Counter(self._names[word] for word in self._names.keys() & there)
        if firsts := self._firsts & there:
            pairs = {first | second << 8 * _WORD for first, second in itertools.pairwise(words) if first in firsts}
            found.update(self._pairs[pair] for pair in self._pairs.keys() & pairs)
        return found


def _forms(name: str, text: bytes) -> Iterator[tuple[str, bytes]]:
    yield name, text
    yield f"{name} reversed", text[::-1]
    yield f"{name} words reversed", _swapped(text)


def _number(text: bytes) -> int:
    return int.from_bytes(text, "little")


def _swapped(text: bytes) -> bytes:
    whole = text[: len(text) // 4 * 4]
    return b"".join(whole[at : at + 4][::-1] for at in range(0, len(whole), 4))


class Mapping(NamedTuple):
    """A mapping of a process: its addresses, the kernel's name of it, and its flags."""

    start: int
    end: int
    name: str
    flags: frozenset[str]

    @property
    def is_locked(self) -> bool:
        """Whether this is secret memory, of either kind."""
        return "secretmem" in self.name or {"lo", "dd"} <= self.flags


def mappings(pid: int) -> Iterator[Mapping]:
    """The readable mappings of a process."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    entries = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)$|^VmFlags: (.*)$", text, re.MULTILINE)
    for head, flags in zip(entries[::2], entries[1::2], strict=True):
        start, end, permissions, name, _ = head
        if permissions.startswith("r") and name not in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            yield Mapping(int(start, 16), int(end, 16), name, frozenset(flags[4].split()))


def snapshot(pid: int) -> list[tuple[str, bytes]]:
    """Return the ordinary memory of a stopped process: the kernel's name of each mapping, and its bytes."""
    pieces = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in mappings(pid):
            if not mapping.is_locked:
                for at in range(mapping.start, mapping.end, _CHUNK):
                    memory.seek(at)
                    pieces.append((mapping.name or "anonymous memory", memory.read(min(_CHUNK, mapping.end - at))))
    assert sum(len(data) for _, data in pieces) > 1 << 23, "a Python process has more memory than that"
    return pieces


def search(pieces: list[tuple[str, bytes]], patterns: SearchPatterns) -> Counter[str]:
    """Return the patterns in a snapshot, by their names and mappings, with their counts of words."""
    found: Counter[str] = Counter()
    for where, data in pieces:
        for name, count in patterns.in_words(data).items():
            found[f"{name} in {where}"] += count
    return found


def scan(pid: int, patterns: SearchPatterns) -> Counter[str]:
    """Return the patterns in the memory of a stopped process, outside its secret memory."""
    return search(snapshot(pid), patterns)


def scan_file(path: Path, patterns: SearchPatterns) -> Counter[str]:
    """Return the patterns in a core dump or a swap file. Notes of registers there are aligned to four bytes, not to eight."""
    found: Counter[str] = Counter()
    data = path.read_bytes()
    for offset in (0, 4):
        found += patterns.in_words(data[offset:])
    return found


# --- key schedules of libraries ---------------------------------------------------------------------------------------


def sm4_round_keys(key: bytes) -> bytes:
    """SM4's 32 round keys, as words of the machine's order."""
    cipher = CryptSM4()
    cipher.set_key(key, SM4_ENCRYPT)
    return struct.pack("<32I", *cipher.sk)


@functools.cache
def _s_box() -> bytes:
    """FIPS 197, 5.1.1: the inverse in GF(2^8), and an affine map."""
    box = bytearray(256)
    p = q = 1
    while True:
        p = p ^ (p << 1 & 0xFF) ^ (0x1B if p & 0x80 else 0)
        for shift in (1, 2, 4):
            q ^= q << shift & 0xFF
        q ^= 0x09 if q & 0x80 else 0
        box[p] = q ^ (q << 1 | q >> 7) & 0xFF ^ (q << 2 | q >> 6) & 0xFF ^ (q << 3 | q >> 5) & 0xFF
        box[p] ^= (q << 4 | q >> 4) & 0xFF ^ 0x63
        if p == 1:
            break
    box[0] = 0x63
    return bytes(box)


def aes_round_keys(key: bytes) -> bytes:
    """FIPS 197, 5.2: the round keys after the key itself."""
    box, size = _s_box(), len(key) // 4
    words = [key[at : at + 4] for at in range(0, len(key), 4)]
    constant = 1
    for number in range(size, 4 * (size + 7)):
        word = words[-1]
        if number % size == 0:
            word = bytes(box[byte] for byte in word[1:] + word[:1])
            word = bytes([word[0] ^ constant]) + word[1:]
            constant = constant << 1 ^ (0x11B if constant & 0x80 else 0)
        elif size > 6 and number % size == 4:
            word = bytes(box[byte] for byte in word)
        words.append(bytes(a ^ b for a, b in zip(words[-size], word, strict=True)))
    return b"".join(words[size:])
