"""Keyrings: content that the age program may have sealed, and the secrets that seal and open it."""

import copy
import functools
import json
import re
import uuid
from typing import Any

import pyrage

from keyferry import age_passphrase
from keyferry.age_passphrase import PassphraseError
from keyferry.secret import SecretMemory
from keyferry_agent.keyring import recipients
from keyferry_agent.keyring.access_keys import AccessKeyEntry
from keyferry_agent.keyring.description import KeyringDescription
from keyferry_agent.keyring.document import Document, KeyEntry, KeyringError, VersionEntry
from keyferry_agent.keyring.keyring import build_keyring, required_bytes
from keyferry_agent.keyring.receipt_keys import ReceiptKeyEntry, ReceiptVersionEntry
from keyferry_agent.keyring.sealing import Unsealer, count_recipients, seal

from ..memory_bound import assert_memory_bounded
from .operators import in_a_file

IDENTITY = "AGE-SECRET-KEY-1WPLMEMA7G9KRZEMLLPXMZP6WNSS6PKW85DZS3KXFDVXM28JS66RQQWFWFG"
"""A public test identity: the keyrings of the corpus are sealed to it."""
PASSPHRASE = "of nobody"
_CHEAP = 4
"""The highest work factor that an input's file is opened with: the time is for parsing, and not for scrypt."""
_DATE = "2026-01-31T12:00:00Z"
_FAR = "2999-01-31T12:00:00Z"
_IDS = [str(uuid.UUID(int=number)) for number in range(1, 10)]
WHOLE = Document(
    [],
    [
        KeyEntry(
            key_id=_IDS[place],
            key_spec=spec,
            created=_DATE,
            versions=[
                VersionEntry(_IDS[2 + place], _DATE, bytearray(range(90, 90 + size))),
                VersionEntry(_IDS[4 + place], _DATE, bytearray(range(size)), staged=True),
            ],
            primary=_IDS[2 + place],
            state=state,
            delete_date=date,
        )
        for place, (spec, size, state, date) in enumerate(
            [("Aliyun_AES_256", 32, "Enabled", ""), ("Aliyun_SM4", 16, "PendingDeletion", _FAR)]
        )
    ],
    {"alias/a": _IDS[0], "alias/b/c-d_e": _IDS[1]},
    {"web-1": "age1"},
    [
        AccessKeyEntry("LTAI1", _DATE, bytearray(b"0123456789abcdef")),
        AccessKeyEntry("STS.2", _DATE, bytearray(b"f" * 128), bytearray(b"t" * 64), enabled=False),
    ],
    [
        ReceiptKeyEntry(
            _IDS[6],
            "Ed25519",
            _IDS[7],
            [
                ReceiptVersionEntry(_IDS[7], _DATE, b"first", bytearray(range(32, 64))),
                ReceiptVersionEntry(_IDS[8], _DATE, b"second", bytearray(range(64, 96)), staged=True),
            ],
        )
    ],
    {"Unknown": [1]},
)
"""A keyring with all there can be in one."""
_MATERIAL = re.compile(r'"([A-Za-z0-9+/]{22}==|[A-Za-z0-9+/]{43}=)"')
"""The Base64 of 16 or 32 bytes, wherever it is."""
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.0, 2**70),
    *([], {}, [[]], [{}], {"": ""}),
    *("", "x", "x" * 9_000, "\ud800", "\0", "alias/" + "x" * 256, "alias/acs"),
    *("Enabled", "Disabled", "PendingDeletion", "PendingImport"),
    *("Aliyun_SM4", "Aliyun_AES_256", "EXTERNAL", "Aliyun_KMS"),
    *(_DATE, _FAR, "2000-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "2026-1-31T12:00:00Z", "2026-02-30T12:00:00Z"),
    *(_IDS[0], _IDS[2], _IDS[4], _IDS[0].upper(), "AAECAwQFBgcICQoLDA0ODw==", "AAECAwQFBgcICQoLDA0ODx=="),
]


def keyring(data: bytes) -> None:
    """Check a keyring's content. After FF, the bytes are pairs of a place in a whole keyring and its new value."""
    if data[:1] == b"\xff":
        data = _changed(data[1:])
    document = assert_memory_bounded(lambda: _read(data), len(data), times=64)
    if isinstance(document, str):
        document.encode()
        materials = _MATERIAL.findall(data.decode(errors="replace"))
        assert not any(material in document for material in materials), document
        return
    again = Document.from_json(document.to_json())
    assert again == document
    _built(document)
    document.purge()
    assert len(document.keys) <= len(again.keys)


def _read(data: bytes) -> Document | str:
    try:
        return Document.from_json(data)
    except KeyringError as error:
        return str(error)


def _changed(how: bytes) -> bytes:
    content = json.loads(WHOLE.to_json())
    for which, by in zip(how[::2], how[1::2], strict=False):
        places = _places(content)
        if places:
            container, key = places[which % len(places)]
            container[key] = copy.deepcopy(VALUES[by % len(VALUES)])
    return json.dumps(content).encode()


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Each value in some JSON, as the container that it is in and its key there."""
    keys: Any = (
        content.keys() if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    )
    return [place for key in keys for place in [(content, key), *_places(content[key])]]


def _built(document: Document) -> None:
    """What the daemon makes of it: the same keys, with the same material."""
    described = document.describe()
    lines = json.loads(json.dumps([key.to_json() for key in described.keys]))
    assert KeyringDescription.from_json(iter(lines), json.loads(json.dumps(described.sections()))) == described
    materials = list(document.material())
    assert [len(material) for material in materials] == list(described.material_sizes())
    left = iter(materials)

    def fill(view: memoryview) -> None:
        view[:] = next(left)

    memory = SecretMemory(required_bytes(described), backing="mlock", require=False)
    made = build_keyring(described, fill, memory)
    for key, version in made.by_version.values():
        assert key.state()
        with version.material.lend() as view:
            assert view in materials
    assert len(made.by_alias) == len(document.aliases)
    made.memory.close()


@functools.cache
def _unsealer() -> Unsealer:
    return Unsealer([pyrage.x25519.Identity.from_str(IDENTITY)], None)


def identity(data: bytes) -> None:
    """As an identity or passphrase file, as a recipient, and as a file sealed to an identity or a passphrase."""
    _sealed_to_a_passphrase(data)
    with in_a_file(data) as path:
        try:
            assert isinstance(Unsealer.read(path), Unsealer)
        except KeyringError as error:
            assert not any(line.decode(errors="replace") in str(error) for line in data.split() if len(line) > 16)
    try:
        text = data.decode("utf-8", "surrogateescape")
        recipients.parse(text)
        assert seal(b"payload", [text], None)
    except KeyringError as error:
        assert len(str(error)) < 400
    assert 0 <= count_recipients(data) <= len(data)
    try:
        _unsealer().unseal(data)
    except KeyringError as error:
        assert len(str(error)) < 500


def _sealed_to_a_passphrase(data: bytes) -> None:
    """Check a header: an accepted one has a single form, and any other file raises the one error."""
    factor = age_passphrase.work_factor(data)
    if factor is not None:
        binary = age_passphrase._without_armor(data)
        assert f" {factor}\n".encode() in binary
        assert binary.count(b"-> scrypt ", 0, binary.index(b"\n---")) == 1
    if factor is not None and _CHEAP < factor <= age_passphrase.MAX_WORK_FACTOR:
        return
    try:
        payload = assert_memory_bounded(lambda: age_passphrase.unseal(data, PASSPHRASE), len(data), times=8)
    except PassphraseError as error:
        assert len(str(error)) < 200
        assert PASSPHRASE not in str(error)
    else:
        assert len(payload) < len(data)
