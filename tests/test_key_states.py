"""Every operation with every state of a key, and the lists."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection
from support.calls import call_ok, call_refused
from support.keyring import change, new_keyring, rewritten, serving, two_callers
from support.keys import recipient

from keyferry.parameters import decode_base64, encode_base64
from keyferry_agent.keyring.document import iso

RSA = recipient("RSAES_OAEP_SHA_256")
STATES = ("Enabled", "Disabled", "PendingDeletion", "PendingImport", "Deleted")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RawConnection, dict[str, str]]]:
    """An agent whose keyring has one key in each state, alias/STATE, with a ciphertext of each from when it was enabled."""
    keyring = new_keyring(tmp_path_factory.mktemp("states"))
    for state in STATES:
        change(keyring, "create-key", "--alias", f"alias/{state}")
    blobs = {}
    with serving(keyring, keyring.parent / "agent.sock") as agent, RawConnection(agent.socket) as connection:
        for state in STATES:
            params = {"KeyId": f"alias/{state}", "Plaintext": "AAAA"}
            blobs[state] = call_ok(connection, "Encrypt", params)["CiphertextBlob"]
    dates = {"PendingDeletion": "9999-01-01T00:00:00Z", "Deleted": "2020-01-01T00:00:00Z"}

    def edit(raw: dict[str, Any]) -> None:
        owners = {owner: alias for alias, owner in raw["Aliases"].items()}
        for key in raw["Keys"]:
            state = owners[key["KeyId"]].removeprefix("alias/")
            if state in STATES:
                stored = "PendingDeletion" if state == "Deleted" else state
                key.update(KeyState=stored, DeleteDate=dates.get(state, ""))

    rewritten(keyring, edit)
    with serving(keyring, keyring.parent / "agent.sock") as agent, RawConnection(agent.socket) as connection:
        yield connection, blobs


BY_KEY: list[tuple[str, dict[str, Any]]] = [
    ("GenerateAndExportDataKey", RSA.params),
    ("GenerateDataKey", {}),
    ("GenerateDataKeyWithoutPlaintext", {}),
    ("Encrypt", {"Plaintext": "AAAA"}),
]
BY_BLOB: list[tuple[str, dict[str, Any]]] = [
    ("ExportDataKey", RSA.params),
    ("Decrypt", {}),
    ("ReEncrypt", {"DestinationKeyId": "alias/Enabled"}),
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("method", "params"), [*BY_KEY, *BY_BLOB], ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_only_enabled_keys_are_used_also_in_a_dry_run(
    made: tuple[RawConnection, dict[str, str]], state: str, method: str, params: dict[str, Any], dry_run: bool
) -> None:
    """Other states have their own codes, and a key past its deletion date is not found."""
    connection, blobs = made
    by_key = (method, params) in BY_KEY
    what = {"KeyId": f"alias/{state}"} if by_key else {"CiphertextBlob": blobs[state]}
    asked = {**params, **what, "DryRun": dry_run}
    codes = {
        "Enabled": "DryRunOperationError" if dry_run else "",
        "Deleted": "Forbidden.AliasNotFound" if by_key else "Forbidden.KeyVersionNotFound",
    }
    code = codes.get(state, f"Rejected.{state}")
    if code:
        call_refused(connection, method, asked, code)
    else:
        call_ok(connection, method, asked)


@pytest.mark.parametrize("state", ["Disabled", "PendingDeletion", "PendingImport"])
def test_re_encrypt_rejects_a_destination_by_its_state(made: tuple[RawConnection, dict[str, str]], state: str) -> None:
    """An enabled source key does not help."""
    connection, blobs = made
    params = {"CiphertextBlob": blobs["Enabled"], "DestinationKeyId": f"alias/{state}"}
    call_refused(connection, "ReEncrypt", params, f"Rejected.{state}")


@pytest.mark.parametrize("state", STATES)
def test_keys_of_every_state_are_described_and_listed(made: tuple[RawConnection, dict[str, str]], state: str) -> None:
    """DescribeKey, ListKeys, ListKeyVersions and ListAliases work in all states until the deletion."""
    connection, _ = made
    if state == "Deleted":
        for method in ("DescribeKey", "ListKeyVersions"):
            call_refused(connection, method, {"KeyId": f"alias/{state}"}, "Forbidden.AliasNotFound")
        aliases = call_ok(connection, "ListAliases", {})["Aliases"]["Alias"]
        assert f"alias/{state}" not in {alias["AliasName"] for alias in aliases}
        return
    described = call_ok(connection, "DescribeKey", {"KeyId": f"alias/{state}"})["KeyMetadata"]
    assert described["KeyState"] == state
    assert bool(described["DeleteDate"]) == (state == "PendingDeletion")
    key_id = described["KeyId"]
    assert {"KeyId": key_id, "KeyArn": described["Arn"]} in call_ok(connection, "ListKeys", {})["Keys"]["Key"]
    (version,) = call_ok(connection, "ListKeyVersions", {"KeyId": key_id})["KeyVersions"]["KeyVersion"]
    assert version == {
        "KeyId": key_id,
        "KeyVersionId": described["PrimaryKeyVersion"],
        "CreationDate": described["CreationDate"],
    }
    entry = {"KeyId": key_id, "AliasName": f"alias/{state}", "AliasArn": f"acs:kms:local:0:alias/{state}"}
    assert entry in call_ok(connection, "ListAliases", {})["Aliases"]["Alias"]


def test_loaded_key_leaves_the_lists_at_its_date(keyring: Path, socket_path: Path) -> None:
    """The time of the request counts, without a reload."""
    change(keyring, "create-key", "--alias", "alias/kept")
    soon = iso(datetime.now(UTC) + timedelta(seconds=3))
    rewritten(keyring, lambda raw: raw["Keys"][0].update(KeyState="PendingDeletion", DeleteDate=soon))
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        seen = set()
        while (total := call_ok(connection, "ListKeys", {})["TotalCount"]) != 1:
            seen.add(total)
        assert seen <= {2}  # on a slow machine its date came before the agent did
        assert call_ok(connection, "GetAgentStatus", {})["Keys"] == 1
        call_refused(connection, "DescribeKey", {"KeyId": "alias/a"}, "Forbidden.AliasNotFound")


@pytest.mark.parametrize(
    ("params", "numbers"),
    [
        ({}, (1, 10)),
        ({"PageNumber": 2}, (2, 10)),
        ({"PageNumber": 3, "PageSize": 5}, (3, 5)),
        ({"PageSize": 100}, (1, 100)),
        ({"PageNumber": 7, "PageSize": 2}, (7, 2)),
        ({"PageNumber": 2**31 - 1, "PageSize": 100}, (2**31 - 1, 100)),
    ],
)
def test_lists_are_paged(many: RawConnection, params: dict[str, int], numbers: tuple[int, int]) -> None:
    """A page has 10 entries by default, and a page past the end is empty."""
    everything = call_ok(many, "ListKeys", {"PageSize": 100})["Keys"]["Key"]
    assert len(everything) == 12
    number, size = numbers
    for method, outer, inner in (("ListKeys", "Keys", "Key"), ("ListAliases", "Aliases", "Alias")):
        page = call_ok(many, method, params)
        assert (page["PageNumber"], page["PageSize"], page["TotalCount"]) == (number, size, 12)
        expected = [key["KeyId"] for key in everything[(number - 1) * size : number * size]]
        assert [entry["KeyId"] for entry in page[outer][inner]] == expected


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawConnection]:
    """An agent with twelve keys."""
    keyring = new_keyring(tmp_path_factory.mktemp("many"))
    for number in range(11):
        change(keyring, "create-key", "--alias", f"alias/n{number}")
    with serving(keyring, keyring.parent / "agent.sock") as agent, RawConnection(agent.socket) as connection:
        yield connection


@pytest.mark.parametrize("method", ["ListKeys", "ListAliases"])
@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"PageNumber": 0}, "PageNumber"),
        ({"PageNumber": 2**31}, "PageNumber"),
        ({"PageSize": 0}, "PageSize"),
        ({"PageSize": 101}, "PageSize"),
        ({"PageSize": "10"}, "PageSize"),
        ({"Filters": "[]"}, "Filters"),
    ],
)
def test_invalid_page_is_refused(
    made: tuple[RawConnection, dict[str, str]], method: str, params: dict[str, Any], name: str
) -> None:
    """The message has the parameter's name."""
    call_refused(made[0], method, params, "InvalidParameter", name)


def test_versions_are_listed_oldest_first_and_staged_ones_too(keyring: Path, socket_path: Path) -> None:
    """DescribeKey tells which version is primary."""
    for arguments in ((), ("--stage",), ()):
        change(keyring, "rotate", "alias/a", *arguments)
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        listed = call_ok(connection, "ListKeyVersions", {"KeyId": "alias/a", "PageSize": 3})
        assert (listed["TotalCount"], len(listed["KeyVersions"]["KeyVersion"])) == (4, 3)
        last = call_ok(connection, "ListKeyVersions", {"KeyId": "alias/a", "PageSize": 3, "PageNumber": 2})
        (newest,) = last["KeyVersions"]["KeyVersion"]
        described = call_ok(connection, "DescribeKey", {"KeyId": "alias/a"})["KeyMetadata"]
        assert described["PrimaryKeyVersion"] == newest["KeyVersionId"]


GRANTS = {
    "list": 'actions=["kms:List*"]\nkeys=["alias/b-*"]\n',
    "use": 'actions=["kms:Encrypt"]\nkeys=["alias/c"]\n',
}


@pytest.mark.parametrize(
    ("granted", "seen"),
    [
        (("list",), {"alias/b-1", "alias/b-2"}),
        (("list", "use"), {"alias/b-1", "alias/b-2", "alias/c"}),
        (("use",), None),
        ((), None),
    ],
)
def test_lists_have_only_keys_that_the_caller_has_a_grant_on(
    keyring: Path, granted: tuple[str, ...], seen: set[str] | None
) -> None:
    """Without a grant to list, the call is refused."""
    for alias in ("alias/b-1", "alias/b-2", "alias/c"):
        change(keyring, "create-key", "--alias", alias)
    with two_callers(keyring, [GRANTS[name] for name in granted]) as (admin, app):
        assert call_ok(admin, "ListKeys", {})["TotalCount"] == 4
        if seen is None:
            for method, params in (("ListKeys", {}), ("ListAliases", {}), ("ListKeyVersions", {"KeyId": "alias/c"})):
                call_refused(app, method, params, "Forbidden.NoPermission")
            return
        aliases = call_ok(app, "ListAliases", {})["Aliases"]["Alias"]
        assert {alias["AliasName"] for alias in aliases} == seen
        assert call_ok(app, "ListKeys", {})["TotalCount"] == call_ok(app, "GetAgentStatus", {})["Keys"] == len(seen)
        call_ok(app, "ListKeyVersions", {"KeyId": "alias/b-1"})
        call_refused(app, "ListKeyVersions", {"KeyId": "alias/c"}, "Forbidden.NoPermission")


def test_a_page_of_the_longest_aliases_fits_a_message(keyring: Path, socket_path: Path) -> None:
    """The page has a hundred aliases of 255 characters, with the longest region and account."""
    for number in range(25):
        change(keyring, "create-alias", f"alias/{'x' * 250}{number:05}", "alias/a")
    more = f'region = "{"r" * 24}"\naccount = "{"1" * 24}"'
    rewritten(
        keyring,
        lambda raw: raw["Aliases"].update({f"alias/{'y' * 250}{n:05}": raw["Keys"][0]["KeyId"] for n in range(75)}),
    )
    with serving(keyring, socket_path, more=more) as agent, agent.client() as kms:
        listed = kms.list_aliases(page_size=100)
        assert listed.total_count == 101
        assert len(listed.aliases.alias) == 100
        assert (
            listed.aliases.alias[1].alias_arn == f"acs:kms:{'r' * 24}:{'1' * 24}:{listed.aliases.alias[1].alias_name}"
        )


def test_rotation_keeps_old_ciphertexts_open(keyring: Path, socket_path: Path) -> None:
    """New ciphertexts are of the new version, and ReEncrypt moves an old one to it."""
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        old = call_ok(connection, "Encrypt", {"KeyId": "alias/a", "Plaintext": encode_base64(b"secret")})
    change(keyring, "rotate", "alias/a")
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        new = call_ok(connection, "GenerateDataKey", {"KeyId": "alias/a"})
        assert new["KeyVersionId"] != old["KeyVersionId"]
        moved = call_ok(
            connection, "ReEncrypt", {"CiphertextBlob": old["CiphertextBlob"], "DestinationKeyId": "alias/a"}
        )
        assert (moved["KeyVersionId"], moved["DestinationKeyVersionId"]) == (old["KeyVersionId"], new["KeyVersionId"])
        for blob in (old["CiphertextBlob"], moved["CiphertextBlob"]):
            assert decode_base64(call_ok(connection, "Decrypt", {"CiphertextBlob": blob})["Plaintext"]) == b"secret"
