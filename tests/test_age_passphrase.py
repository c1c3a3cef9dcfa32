"""Sealing to a passphrase in age's format: the work factor, strict parsing, damage, and the `age` program as the other end.

`KEYFERRY_AGE_VECTORS` names a folder with age's published test vectors (C2SP/CCTV, age/testdata). They are checked too then.
"""

import hashlib
import os
import re
import resource
import subprocess
import sys
import zlib
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pyrage
import pytest
from support.agent import PATIENCE
from support.quota import cpu_quota
from support.secrets import secret_file
from support.skip_unless import cpu_quota as requires_cpu_quota
from support.skip_unless import program
from support.terminal import run_with_passphrase

from keyferry import age_passphrase
from keyferry.age_passphrase import PassphraseError, _seal, seal, unseal, work_factor

PASSPHRASE: Final = "correct hörse"
CHUNK: Final = 65_536
VECTORS: Final = os.environ.get("KEYFERRY_AGE_VECTORS")


@pytest.fixture(scope="module")
def sealed() -> bytes:
    """A file with a low work factor, so that a test can open it a thousand times."""
    return _seal(b"payload", PASSPHRASE, 2)


def with_factor(sealed: bytes, factor: str) -> bytes:
    """The file with another text in the place of its work factor."""
    return re.sub(rb"(-> scrypt \S+) \S+", rb"\1 " + factor.encode(), sealed, count=1)


# --- the work factor --------------------------------------------------------------------------------------------------


def test_sealing_uses_work_factor_18() -> None:
    """The age program seals with 2^18, too."""
    sealed = seal(b"payload", PASSPHRASE)
    assert re.match(rb"age-encryption\.org/v1\n-> scrypt \S{22} 18\n", sealed)
    assert work_factor(sealed) == 18
    assert unseal(sealed, PASSPHRASE) == b"payload"


@requires_cpu_quota()
def test_a_cpu_quota_does_not_change_the_work_factor(tmp_path: Path) -> None:
    """A measurement chose 14 under such a quota, and opening refused a file that it estimated to be slow."""
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    keyring = tmp_path / "keyring.age"
    command = [sys.executable, "-m", "keyferry_agent", "keyring"]
    with cpu_quota(20) as enter:
        for verb, option in (("init", "--passphrase-file"), ("list", "--unseal")):
            arguments = [*command, verb, str(keyring), option, str(tmp_path / "passphrase")]
            subprocess.run(arguments, preexec_fn=enter, timeout=PATIENCE, check=True)
    assert work_factor(keyring.read_bytes()) == 18


@pytest.mark.parametrize("factor", range(1, 18))
def test_every_lower_work_factor_opens(factor: int) -> None:
    """Other programs may have chosen a lower work factor."""
    sealed = _seal(b"payload", PASSPHRASE, factor)
    assert work_factor(sealed) == factor
    assert unseal(sealed, PASSPHRASE) == b"payload"


def test_the_highest_work_factor_is_inclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is tried at 14, because 2^22 takes 4 GiB."""
    monkeypatch.setattr(age_passphrase, "MAX_WORK_FACTOR", 14)
    assert unseal(_seal(b"payload", PASSPHRASE, 14), PASSPHRASE) == b"payload"
    with pytest.raises(PassphraseError, match="work factor 15 is too high: at most 14"):
        unseal(_seal(b"payload", PASSPHRASE, 15), PASSPHRASE)


@pytest.mark.parametrize("factor", ["23", "24", "64", "999999999"])
def test_a_work_factor_above_the_bound_is_named(sealed: bytes, factor: str) -> None:
    """The message has both numbers, and no memory is allocated."""
    with pytest.raises(PassphraseError, match=rf"work factor {factor} is too high: at most 22 \(4096 MiB of memory\)"):
        unseal(with_factor(sealed, factor), PASSPHRASE)


def test_short_memory_is_an_error_with_the_work_factor() -> None:
    """A process with an address space of 512 MiB cannot compute 2^20, which takes 1 GiB."""
    code = """
from keyferry.age_passphrase import PassphraseError, _seal
try:
    _seal(b"payload", "correct horse", 20)
except PassphraseError as error:
    print(error)
"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))

    ended = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=True)
    assert ended.stdout == "not enough memory: work factor 20 takes 1024 MiB\n"


# --- strict parsing ---------------------------------------------------------------------------------------------------


def edited(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """A function that replaces a part of a file, which has to be there."""

    def edit(sealed: bytes) -> bytes:
        assert re.search(old, sealed)
        return re.sub(old, new, sealed, count=1)

    return edit


MALFORMED: Final[dict[str, Callable[[bytes], bytes]]] = {
    "factor with a leading zero": edited(rb" 2\n", rb" 02\n"),
    "factor zero": edited(rb" 2\n", rb" 0\n"),
    "negative factor": edited(rb" 2\n", rb" -2\n"),
    "factor with a sign": edited(rb" 2\n", rb" +2\n"),
    "hexadecimal factor": edited(rb" 2\n", rb" 0x2\n"),
    "factor with a letter behind it": edited(rb" 2\n", rb" 2x\n"),
    "factor with a letter before it": edited(rb" 2\n", rb" x2\n"),
    "factor in other digits": edited(rb" 2\n", " ２\n".encode()),
    "factor of many digits": edited(rb" 2\n", b" " + b"9" * 5_000 + b"\n"),
    "no factor": edited(rb" 2\n", rb"\n"),
    "another argument": edited(rb" 2\n", rb" 2 2\n"),
    "another space": edited(rb" 2\n", rb"  2\n"),
    "space at the end": edited(rb" 2\n", rb" 2 \n"),
    "no salt": edited(rb"scrypt \S+", rb"scrypt"),
    "short salt": edited(rb"scrypt \S\S", rb"scrypt "),
    "long salt": edited(rb"scrypt ", rb"scrypt AAAA"),
    "salt with padding": edited(rb" 2\n", rb"== 2\n"),
    "stray bits in the salt": edited(rb"\S 2\n", rb"B 2\n"),
    "stray bits in the body": edited(rb"\S\n---", rb"B\n---"),
    "stray bits in the MAC": edited(rb"(\n--- \S{42})\S\n", rb"\1B\n"),
    "body with padding": edited(rb"\n---", rb"=\n---"),
    "long body": edited(rb"\n---", rb"AAAA\n---"),
    "empty body": edited(rb"\n\S+\n---", rb"\n\n---"),
    "no body": edited(rb"\n\S+\n---", rb"\n---"),
    "body in two lines": edited(rb"\n(\S{20})(\S+)\n---", rb"\n\1\n\2\n---"),
    "carriage returns": lambda sealed: sealed.replace(b"\n", b"\r\n"),
    "no MAC": edited(rb"\n--- \S+\n", rb"\n---\n"),
    "no space before the MAC": edited(rb"\n--- ", rb"\n---"),
    "space behind the MAC": edited(rb"(\n--- \S+)\n", rb"\1 \n"),
    "two scrypt stanzas": edited(rb"(-> scrypt [^-]+)(---)", rb"\1\1\2"),
    "a stanza before it": edited(rb"-> scrypt", b"-> X25519 " + b"A" * 43 + b"\n" + b"A" * 43 + b"\n-> scrypt"),
    "a stanza behind it": edited(rb"\n---", rb"\n-> grease\n\n---"),
    "another version": edited(rb"/v1", rb"/v2"),
    "upper case": edited(rb"scrypt", rb"SCRYPT"),
    "something before it": lambda sealed: b"x" + sealed,
    "nothing": lambda _: b"",
    "the version only": lambda sealed: sealed[:22],
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_header_in_another_form_is_refused(sealed: bytes, case: str) -> None:
    """One file, one form; nothing is computed for any other."""
    damaged = MALFORMED[case](sealed)
    with pytest.raises(
        PassphraseError, match=r"header is damaged|not sealed to a passphrase|not a file that age sealed"
    ):
        unseal(damaged, PASSPHRASE)
    assert work_factor(damaged) is None


def test_every_bit_of_the_header_counts() -> None:
    """A changed bit of the header is an error, and never leads to another payload."""
    sealed = _seal(b"payload", PASSPHRASE, 1)
    for place in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[place] ^= 1 << bit
            with pytest.raises(PassphraseError):
                unseal(bytes(damaged), PASSPHRASE)


@pytest.mark.parametrize("size", [0, 1, CHUNK, CHUNK + 1])
def test_a_payload_that_is_cut_off_or_longer_is_refused(size: int) -> None:
    """A payload that ends early or late is refused, also at the borders of chunks."""
    sealed = _seal(bytes(size), PASSPHRASE, 1)
    start = sealed.index(b"\n--- ") + 49
    chunk = CHUNK + 16
    cuts = {len(sealed) - 1, start, start + 1, start + 15, start + 16, start + 31, start + 16 + chunk}
    for damaged in [sealed[:cut] for cut in cuts if cut < len(sealed)] + [sealed + bytes(n) for n in (1, 16, chunk)]:
        with pytest.raises(PassphraseError, match=r"cut off|header is damaged"):
            unseal(damaged, PASSPHRASE)


def test_chunks_in_another_order_are_refused() -> None:
    """The nonce of each chunk has its number."""
    sealed = _seal(os.urandom(3 * CHUNK), PASSPHRASE, 1)
    start, chunk = sealed.index(b"\n--- ") + 49 + 16, CHUNK + 16
    first, second, third = (sealed[start + i * chunk : start + (i + 1) * chunk] for i in range(3))
    for chunks in ([second, first, third], [first, third], [first, second], [first, first, third]):
        with pytest.raises(PassphraseError, match="damaged or cut off"):
            unseal(sealed[:start] + b"".join(chunks), PASSPHRASE)


def test_errors_show_no_passphrase(sealed: bytes) -> None:
    """An application may log an exception and its cause."""
    for passphrase in ("wrong but secret", "wrong but secret\udcff"):
        with pytest.raises(PassphraseError) as caught:
            unseal(sealed, passphrase)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


# --- other implementations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5, 17_000_000])
def test_pyrage_opens_payloads_of_every_size(size: int) -> None:
    """The last one has more than 256 chunks, so that the counter takes two bytes."""
    payload = os.urandom(size)
    sealed = _seal(payload, PASSPHRASE, 2)
    assert bytes(pyrage.passphrase.decrypt(sealed, PASSPHRASE)) == payload
    assert unseal(sealed, PASSPHRASE) == payload


def test_a_file_that_pyrage_sealed_opens() -> None:
    """Earlier versions sealed with pyrage, which measured the work factor."""
    payload = os.urandom(2 * CHUNK + 1)
    assert unseal(bytes(pyrage.passphrase.encrypt(payload, PASSPHRASE)), PASSPHRASE) == payload


@program("age", "age")
def test_the_age_program_opens_a_sealed_file(tmp_path: Path) -> None:
    """An operator can open a sealed file in an emergency without Keyferry."""
    payload = os.urandom(3 * CHUNK + 1)
    (tmp_path / "sealed").write_bytes(seal(payload, PASSPHRASE))
    arguments = ["age", "-d", "-o", tmp_path / "opened", tmp_path / "sealed"]
    assert run_with_passphrase(arguments, PASSPHRASE) == 0
    assert (tmp_path / "opened").read_bytes() == payload


@program("age", "age")
@pytest.mark.parametrize("armor", [[], ["-a"]])
def test_a_file_of_the_age_program_opens(tmp_path: Path, armor: list[str]) -> None:
    """A file of the age program opens, binary or armored."""
    payload = os.urandom(3 * CHUNK + 1)
    (tmp_path / "plain").write_bytes(payload)
    arguments = ["age", "-p", *armor, "-o", tmp_path / "sealed", tmp_path / "plain"]
    assert run_with_passphrase(arguments, PASSPHRASE, prompts=2) == 0
    sealed = (tmp_path / "sealed").read_bytes()
    assert unseal(sealed, PASSPHRASE) == payload
    assert work_factor(sealed) == 18


# --- armor ------------------------------------------------------------------------------------------------------------


def armored(sealed: bytes) -> bytes:
    """The file in age's armor."""
    text = b64encode(sealed)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN AGE ENCRYPTED FILE-----", *lines, b"-----END AGE ENCRYPTED FILE-----", b""])


def test_armor_may_have_either_line_end_and_whitespace_around(sealed: bytes) -> None:
    """The format allows CRLF and whitespace around the armor."""
    text = armored(sealed)
    for variant in (text, text.replace(b"\n", b"\r\n"), text.rstrip(b"\n"), b" \r\n\t" + text + b"\n \n"):
        assert unseal(variant, PASSPHRASE) == b"payload"


@pytest.mark.parametrize(
    "damage",
    [
        edited(rb"\n(\S{63})(\S)\n", rb"\n\1\n\2\n"),
        edited(rb"(\S{64})\n(\S)", rb"\1\2\n"),
        edited(rb"FILE-----\n", rb"FILE-----\n\n"),
        edited(rb"\n-----END", rb"\n\n-----END"),
        edited(rb"FILE-----\n", rb"FILE-----\nName: value\n\n"),
        edited(rb"-----END AGE ENCRYPTED FILE-----", rb""),
        edited(rb"-----BEGIN AGE ENCRYPTED", rb"-----BEGIN age encrypted"),
        edited(rb"-----BEGIN AGE", rb"-----BEGIN PGP"),
        lambda _: b"-----BEGIN ",
        lambda _: b"-----BEGIN AGE ENCRYPTED FILE-----\n-----END AGE ENCRYPTED FILE-----\nx",
        edited(rb"\n(\S{10})\S", rb"\n\1*"),
        edited(rb"(\S)\n-----END", rb"\1 \n-----END"),
        edited(rb"FILE-----\n$", rb"FILE-----\nx"),
    ],
)
def test_armor_in_another_form_is_refused(sealed: bytes, damage: Callable[[bytes], bytes]) -> None:
    """A strict PEM reader has one form for each file."""
    with pytest.raises(PassphraseError, match="armor is damaged"):
        unseal(damage(armored(sealed)), PASSPHRASE)


# --- published vectors, where they are at hand ------------------------------------------------------------------------

if VECTORS:

    @pytest.mark.parametrize("path", sorted(Path(VECTORS).iterdir()), ids=lambda path: path.name)
    def test_a_published_vector(path: Path) -> None:
        """A vector with a passphrase is opened as a file; the payload of any other is opened with its file key."""
        text, _, file = path.read_bytes().partition(b"\n\n")
        fields = dict(line.split(": ", 1) for line in text.decode().splitlines())
        assert fields.keys() <= {
            "expect",
            "payload",
            "file key",
            "identity",
            "passphrase",
            "armored",
            "comment",
            "compressed",
        }
        if fields.get("compressed") == "zlib":
            file = zlib.decompress(file)
        passes = fields["expect"] == "success"
        try:
            if "passphrase" in fields:
                opened = unseal(file, fields["passphrase"])
            else:
                file = age_passphrase._without_armor(file)
                with pytest.raises(PassphraseError):
                    unseal(file, "any")
                if fields["expect"] not in ("success", "payload failure"):
                    return
                payload = file[file.index(b"\n---") :].split(b"\n", 2)[2]
                opened = age_passphrase._open_payload(bytearray.fromhex(fields["file key"]), memoryview(payload))
        except PassphraseError:
            assert not passes
        else:
            assert passes
            assert hashlib.sha256(opened).hexdigest() == fields["payload"]
