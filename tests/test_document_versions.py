"""Version 2 of a keyring's document: hosts, access keys, receipt keys, and sections of later programs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.keyring import Command

from keyferry.secret import SecretMemory
from keyferry_agent.keyring import changes, file
from keyferry_agent.keyring.access_keys import AccessKeyEntry
from keyferry_agent.keyring.document import Document, KeyringError
from keyferry_agent.keyring.fdstore import KeyringPersister
from keyferry_agent.keyring.keyring import Keyring, build_keyring, required_bytes
from keyferry_agent.keyring.loader import load
from keyferry_agent.keyring.receipt_keys import ReceiptKeyEntry, ReceiptVersionEntry
from keyferry_agent.keyring.sealing import Unsealer

DATE = "2026-01-31T12:00:00Z"
SECRET, TOKEN = b"s" * 30, b"t" * 64
RECEIPT_KEY = "11111111-1111-4111-8111-111111111111"
VERSION, STAGED = "22222222-2222-4222-8222-222222222222", "33333333-3333-4333-8333-333333333333"


def extend(document: Document) -> None:
    """Add one entry of each kind that only version 2 has."""
    document.hosts["web-17"] = "age1host"
    document.access_keys += [
        AccessKeyEntry("LTAIone", DATE, bytearray(SECRET), description="orders"),
        AccessKeyEntry("STS.two", DATE, bytearray(SECRET), bytearray(TOKEN), enabled=False),
    ]
    versions = [
        ReceiptVersionEntry(VERSION, DATE, b"public", bytearray(b"m" * 32)),
        ReceiptVersionEntry(STAGED, DATE, b"next", bytearray(b"n" * 32), staged=True),
    ]
    document.receipt_keys.append(ReceiptKeyEntry(RECEIPT_KEY, "Ed25519", VERSION, versions))


def content(document: Document) -> Any:
    """Return the JSON of a document as objects."""
    return json.loads(document.to_json())


@pytest.fixture
def extended(keyring: Path, tmp_path: Path) -> Path:
    """A keyring of version 2 with a section of a later program."""
    with file.change(keyring, Unsealer.read(tmp_path / "identity")) as document:
        extend(document)
        document.other_sections["Later"] = {"Deep": [1, None]}
    return keyring


def test_a_document_without_new_sections_stays_version_1() -> None:
    """A program of version 1 reads every keyring that does not use what is new."""
    document = Document([])
    assert content(document) == {
        "Format": "keyferry-keyring",
        "Version": 1,
        "Recipients": [],
        "Keys": [],
        "Aliases": {},
    }
    extend(document)
    assert content(document)["Version"] == 2
    document.access_keys.clear()
    document.receipt_keys.clear()
    assert content(document)["Version"] == 2
    document.hosts.clear()
    assert content(document)["Version"] == 1


def test_a_version_2_document_is_read_as_it_was_written() -> None:
    """JSON and back changes nothing."""
    document = Document(["age1host"])
    extend(document)
    document.other_sections["Later"] = []
    assert Document.from_json(document.to_json()) == document


def test_version_1_knows_no_other_sections() -> None:
    """A version 1 document with a section of version 2 is refused."""
    for name, value in (("Hosts", {}), ("AccessKeys", []), ("ReceiptKeys", []), ("Later", 1)):
        raw = {**content(Document([])), name: value}
        with pytest.raises(KeyringError, match=f"unknown fields.*{name}"):
            Document.from_json(json.dumps(raw).encode())


def test_a_version_of_the_future_is_refused_by_its_number() -> None:
    """The message names the version, and the versions that this program reads."""
    raw = {**content(Document([])), "Version": 3}
    with pytest.raises(KeyringError, match="has format version 3; this program knows versions 1 and 2: upgrade it"):
        Document.from_json(json.dumps(raw).encode())


def test_verbs_keep_sections_that_they_do_not_know(extended: Path, tmp_path: Path, keyring_json: Command) -> None:
    """A rotation leaves hosts, access keys, receipt keys and the section of a later program unchanged."""
    unsealer = Unsealer.read(tmp_path / "identity")
    before = content(file.read(extended, unsealer))
    keyring_json("rotate", "alias/a")
    after = content(file.read(extended, unsealer))
    assert len(after.pop("Keys")[0]["KeyVersions"]) == len(before.pop("Keys")[0]["KeyVersions"]) + 1
    assert after == before
    assert after["Later"] == {"Deep": [1, None]}


def changed(**fields: Any) -> bytes:
    """Return a version 2 document in which fields of the first access key or receipt key have other values."""
    document = Document([])
    extend(document)
    raw = content(document)
    for name, value in fields.items():
        section, _, field = name.partition("__")
        raw[section][0][field] = value
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"AccessKeys__AccessKeySecret": "short"}, "AccessKeySecret: 16 to 128 printable ASCII"),
        ({"AccessKeys__AccessKeySecret": "with a space in the secret"}, "AccessKeySecret: 16 to 128 printable ASCII"),
        ({"AccessKeys__AccessKeySecret": "ééééééééééééééééééé"}, "AccessKeySecret: 16 to 128 printable ASCII"),
        ({"AccessKeys__SecurityToken": "x" * 129}, "SecurityToken: 16 to 128 printable ASCII"),
        ({"AccessKeys__AccessKeyId": "LTAI one"}, "AccessKeyId: an access key ID has 1 to 128"),
        ({"AccessKeys__AccessKeyId": "STS.two"}, "the same AccessKeyId twice"),
        ({"AccessKeys__Status": "Enabled"}, "Status: one of Active, Inactive is expected"),
        ({"AccessKeys__CreationDate": ""}, "CreationDate: a date like"),
        ({"AccessKeys__Owner": "me"}, "unknown fields .*Owner"),
        ({"ReceiptKeys__KeySpec": "RSA_2048"}, "KeySpec: one of Ed25519, EC_SM2 is expected"),
        ({"ReceiptKeys__PrimaryKeyVersion": STAGED}, "PrimaryKeyVersion is not a version of the key, or is staged"),
        ({"ReceiptKeys__KeyVersions": []}, "PrimaryKeyVersion is not a version of the key, or is staged"),
    ],
)
def test_a_bad_entry_is_refused_by_its_path(fields: dict[str, Any], message: str) -> None:
    """The error names the entry and the field, and does not quote a secret."""
    with pytest.raises(KeyringError, match=message) as caught:
        Document.from_json(changed(**fields))
    for value in fields.values():
        assert not value or str(value) not in str(caught.value) or "Owner" in message or "Status" in message


def test_a_keyring_has_one_receipt_key_for_each_spec() -> None:
    """A second Ed25519 key is refused."""
    document = Document([])
    extend(document)
    raw = content(document)
    second = json.loads(
        json.dumps(raw["ReceiptKeys"][0]).replace("1111", "4444").replace("2222", "5555").replace("3333", "6" * 4)
    )
    raw["ReceiptKeys"].append(second)
    with pytest.raises(KeyringError, match="the same KeySpec of a receipt key twice"):
        Document.from_json(json.dumps(raw).encode())


def test_changes_of_access_keys_are_logged_without_secrets(extended: Path) -> None:
    """The log of changes names what was added, and has neither secrets nor tokens."""
    text = changes.log_of(extended).read_text()
    added = [change for line in text.splitlines() for change in json.loads(line)["changes"]]
    for names in (
        {"host": "web-17"},
        {"access_key_id": "LTAIone"},
        {"access_key_id": "STS.two"},
        {"receipt_key_id": RECEIPT_KEY},
        {"receipt_key_id": RECEIPT_KEY, "key_version_id": STAGED},
    ):
        assert {**names, "change": "added"} in added
    assert SECRET.decode() not in text
    assert TOKEN.decode() not in text


def assert_material(keyring: Keyring) -> None:
    """Check that each secret of `extend` is where its description says."""
    one, two = keyring.access_keys["LTAIone"], keyring.access_keys["STS.two"]
    assert (one.description.enabled, two.description.enabled) == (True, False)
    assert one.token is None
    assert two.token is not None
    (receipt_key,) = keyring.receipt_keys.values()
    pieces = [one.secret, two.secret, two.token, receipt_key.materials[VERSION], receipt_key.materials[STAGED]]
    for piece, expected in zip(pieces, [SECRET + b"&", SECRET + b"&", TOKEN, b"m" * 32, b"n" * 32], strict=True):
        with piece.lend() as view:
            assert view == expected
    assert [version.staged for version in receipt_key.description.versions] == [False, True]


def test_the_daemon_loads_all_secrets_into_secret_memory(extended: Path, tmp_path: Path) -> None:
    """The loader's pipe has the material of access keys and receipt keys behind that of master keys."""
    keyring = load(extended, tmp_path / "identity", backing="auto", require=False)
    assert_material(keyring)
    assert len(keyring.keys) == 1


@pytest.fixture
def store() -> Iterator[dict[str, int]]:
    """A service manager's store of descriptors, which are duplicates and closed at the end."""
    descriptors: dict[str, int] = {}
    yield descriptors
    for descriptor in descriptors.values():
        os.close(descriptor)


def test_a_kept_keyring_has_its_access_keys(extended: Path, tmp_path: Path, store: dict[str, int]) -> None:
    """The service manager's descriptors carry access keys and receipt keys over a restart."""

    def keep(name: str, descriptor: int) -> bool:
        store[name] = os.dup(descriptor)
        return True

    persister = KeyringPersister(keep, lambda _: None)
    keyring = load(extended, tmp_path / "identity", backing="auto", require=False, persister=persister)
    if keyring.memory.protection != "memfd_secret":
        pytest.skip("no memfd_secret here, which a kept keyring needs")
    assert persister.commit(keyring, None)
    keyring.memory.detach()
    kept = [(name, store.pop(name)) for name in list(store)]
    restored = KeyringPersister(keep, lambda _: None).restore(kept)
    assert restored is not None
    assert_material(restored[0])


def test_a_keyring_describes_what_it_was_built_from() -> None:
    """`Keyring.describe` returns the description that `build_keyring` was given."""
    document = Document([])
    extend(document)
    description = document.describe()
    pieces = document.material()

    def fill(view: memoryview) -> None:
        view[:] = next(pieces)

    keyring = build_keyring(description, fill, SecretMemory(required_bytes(description), require=False))
    assert keyring.describe() == description
    assert_material(keyring)
