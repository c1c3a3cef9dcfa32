"""CiphertextBlob, the EncryptionContext bound to it, and the forms of an SM2 ciphertext: each beside a second reader."""

import functools
import json
import uuid
from typing import Any

from Cryptodome.Util.asn1 import DerOctetString, DerSequence
from reference import blob_decoder

from keyferry import sm2_ciphertext as sm2
from keyferry.errors import KmsError
from keyferry.parameters import ENCRYPTION_CONTEXT, decode_base64, encode_base64
from keyferry.secret import SecretMemory
from keyferry_agent.crypto import ciphertext_blob
from keyferry_agent.crypto.aad import associated_data

from ..memory_bound import assert_memory_bounded

KEY_ID = str(uuid.UUID(int=1))
VERSION_ID = str(uuid.UUID(int=2))
CONTEXTS: tuple[dict[str, str], ...] = ({}, {"tenant": "acme"}, {"tenant": "acme", "größe": "密"})
SPECS = tuple(ciphertext_blob.KEY_SIZES)
_SALT = 32


@functools.cache
def _scratch() -> SecretMemory:
    return SecretMemory(65_536, backing="mlock", require=False)


def cmk(spec: str) -> bytes:
    """The master key of all blobs here."""
    return bytes(range(ciphertext_blob.KEY_SIZES[spec]))


def ciphertext(data: bytes) -> None:
    """A blob, after a byte that says with which algorithm and under which context it is opened. An odd one asks for a blob that
    is made here, of the salt and the plaintext that follow: that opens.
    """
    how, rest = (data[0], data[1:]) if data else (0, b"")
    spec, context = SPECS[how >> 1 & 1], CONTEXTS[(how >> 2) % len(CONTEXTS)]
    if how & 1 and len(rest) > _SALT:
        salt, plaintext = rest[:_SALT], rest[_SALT:]
        key = memoryview(bytearray(cmk(spec)))
        blob = ciphertext_blob.bind(spec, VERSION_ID, KEY_ID, context).encrypt(
            key, memoryview(bytearray(plaintext)), _scratch(), salt
        )
        assert blob == blob_decoder.seal_blob(spec, cmk(spec), VERSION_ID, KEY_ID, context, plaintext, salt)
        assert _opened(spec, context, blob) == plaintext
        return
    mine = assert_memory_bounded(lambda: _opened(spec, context, rest), len(rest), times=8)
    try:
        second: bytes | None = blob_decoder.open_blob(spec, cmk(spec), KEY_ID, context, rest)
    except blob_decoder.NotAuthentic:
        second = None
    assert mine == second
    _base64(rest)


def _opened(spec: str, context: dict[str, str], blob: bytes) -> bytes | None:
    try:
        assert ciphertext_blob.key_version_id(blob).encode() == blob[:36]
        out = bytearray(ciphertext_blob.plaintext_size(blob))
        key = memoryview(bytearray(cmk(spec)))
        ciphertext_blob.decrypt_into(spec, key, blob, KEY_ID, context, memoryview(out), _scratch())
    except ciphertext_blob.BlobError:
        return None
    return bytes(out)


def _base64(data: bytes) -> None:
    """Bytes have one text, and a text that is taken is the one."""
    assert decode_base64(encode_base64(data)) == data
    try:
        text = data.decode("utf-8", "surrogateescape")
        assert encode_base64(decode_base64(text)) == text
    except ValueError:
        return


def context(data: bytes) -> None:
    """Check the text of a context: an accepted text is bound in one form, which a second reader reads back."""
    text = data.decode("utf-8", "surrogateescape")
    taken = assert_memory_bounded(lambda: _taken(text), len(data), times=100)
    if taken is None:
        return
    assert _taken(taken) == taken, "as a map it is taken as it is as text"
    assert _taken(json.dumps(dict(reversed(taken.items())), ensure_ascii=False, separators=(",", ":"))) == taken
    header = VERSION_ID.encode() + b"\x01"
    bound = associated_data(header, KEY_ID, taken)
    assert bound == blob_decoder.associated_data(header, KEY_ID, taken)
    assert blob_decoder.read_associated_data(bound) == (header, KEY_ID, taken)
    for key, value in taken.items():
        for other in (
            {**taken, key: value + "x"},
            {**taken, key + "x": value},
            {k: v for k, v in taken.items() if k != key},
        ):
            assert associated_data(header, KEY_ID, other) != bound or other == taken


def _taken(value: Any) -> dict[str, str] | None:
    try:
        return ENCRYPTION_CONTEXT.check(ENCRYPTION_CONTEXT.name, value)
    except KmsError as error:
        assert error.code == "InvalidParameter"
        assert len(error.message.encode()) < 500
        return None


def sm2_ciphertext(data: bytes) -> None:
    """Check bytes in each of the three forms: an accepted text is the only encoding of its ciphertext."""
    raws = assert_memory_bounded(
        lambda: [_raw(read, data) for read in (sm2.der_to_raw, sm2.sdf_to_raw)], len(data), times=16
    )
    for raw, write in zip(raws, (sm2.raw_to_der, sm2.raw_to_sdf), strict=True):
        assert raw is None or write(raw) == data
    assert raws[0] == _second_der(data)
    for write, read in ((sm2.raw_to_der, sm2.der_to_raw), (sm2.raw_to_sdf, sm2.sdf_to_raw)):
        made = _raw(write, data)
        assert made is None or read(made) == data


def _raw(convert: Any, data: bytes) -> bytes | None:
    try:
        return bytes(convert(data))
    except ValueError:
        return None


def _second_der(data: bytes) -> bytes | None:
    """The same by pycryptodomex's reader, which does not insist that it is the shortest: so it is written anew."""
    try:
        read: Any = DerSequence().decode(data, strict=True)
        x, y, c3, c2 = read
        texts = [DerOctetString().decode(part, strict=True) for part in (c3, c2)]
    except (ValueError, TypeError, IndexError):
        return None
    if not (isinstance(x, int) and isinstance(y, int)) or not (0 <= x < 1 << 256 and 0 <= y < 1 << 256):
        return None
    c3, c2 = (text.payload for text in texts)
    if DerSequence([x, y, *texts]).encode() != data or len(c3) != 32 or not c2 or len(data) > 65_540:
        return None
    return b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big") + c3 + c2
