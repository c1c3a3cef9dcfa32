"""Requests that come again: decided once, and not a moment longer than the decision holds."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from support.agent import RawConnection
from support.audit_log import requests
from support.calls import result
from support.keyring import change, configuration, serving
from support.keys import recipient

from keyferry.ciphertext import ciphertext_hash
from keyferry_agent.authz.decision_cache import DecisionCache
from keyferry_agent.authz.grants import CallerGrants

GENERATE: dict[str, Any] = {
    "KeyId": "alias/a",
    "EncryptionContext": {"tenant": "acme"},
    **recipient("RSAES_OAEP_SHA_256").params,
}
SM2 = GENERATE | recipient("SM2PKE").params
THRICE = 3
"""A request is remembered when it comes the second time, and so recalled the third time."""


GRANTED, OTHERS = CallerGrants(()), CallerGrants(())


def test_request_is_cached_when_it_comes_twice() -> None:
    """The second request is cached; a caller with other grants, and another request, miss."""
    cache: DecisionCache[str] = DecisionCache()
    cache.add(GRANTED, b"request", "decided")
    assert cache.get(GRANTED, b"request") is None
    cache.add(GRANTED, b"request", "decided")
    assert cache.get(GRANTED, b"request") == "decided"
    assert cache.get(OTHERS, b"request") is None
    assert cache.get(GRANTED, b"another") is None


def test_memory_of_the_cache_is_bounded() -> None:
    """The size of the requests counts as well as their number."""
    cache: DecisionCache[int] = DecisionCache()
    largest = 0
    for number in range(20_000):
        for _ in range(2):
            cache.add(GRANTED, number.to_bytes(4, "big") * 100, number)
        largest = max(largest, len(cache))
    assert 15_000 < largest < 18_000
    assert cache.get(GRANTED, number.to_bytes(4, "big") * 100) == number
    for _ in range(THRICE):
        cache.add(GRANTED, bytes(4_096), 1)
        cache.add(GRANTED, bytes(4_097), 0)
    assert cache.get(GRANTED, bytes(4_096)) == 1
    assert cache.get(GRANTED, bytes(4_097)) is None


def test_requests_seen_once_are_forgotten_after_16384_others() -> None:
    """A caller that never repeats a request cannot fill the memory with hashes."""
    cache: DecisionCache[int] = DecisionCache()

    def is_cached_after(others: int) -> bool:
        cache.add(GRANTED, b"first", 1)
        for number in range(others):
            cache.add(GRANTED, b"%d %d" % (others, number), 0)
        cache.add(GRANTED, b"first", 1)
        return cache.get(GRANTED, b"first") is not None

    assert not is_cached_after(16_384)
    assert is_cached_after(16_000)


def codes(connection: RawConnection, operation: str = "GenerateAndExportDataKey", params: Any = None) -> list[str]:
    """How the same request ends, so often that it is recalled."""
    answers = [connection.call(operation, params or GENERATE, msgid) for msgid in range(2 * THRICE)]
    return ["OK" if answer.error is None else answer.error["Code"] for answer in answers]


@pytest.mark.parametrize("params", [GENERATE, SM2], ids=["RSA_2048", "EC_SM2"])
def test_equal_requests_have_distinct_answers_and_entries(
    keyring: Path, socket_path: Path, tmp_path: Path, params: dict[str, Any]
) -> None:
    """Each answer has its own data key and RequestId; the entries differ in the ciphertext's hash."""
    record = tmp_path / "audit.jsonl"
    with (
        serving(keyring, socket_path, more=f'[audit]\npath = "{record}"\n') as agent,
        RawConnection(agent.socket) as connection,
    ):
        made = [connection.call("GenerateAndExportDataKey", params, msgid).result for msgid in range(8)]
        opened = [
            connection.call(
                "Decrypt",
                {"CiphertextBlob": each["CiphertextBlob"], "EncryptionContext": params["EncryptionContext"]},
            ).result
            for each in made
            if each is not None
        ]
    for name in ("CiphertextBlob", "ExportedDataKey", "RequestId"):
        assert len({each[name] for each in made if each is not None}) == 8
    assert len({each["Plaintext"] for each in opened if each is not None}) == 8
    all_lines = requests(record)
    lines = all_lines[:8]
    assert [line["request_id"] for line in lines] == [each["RequestId"] for each in made if each is not None]
    hashes = [ciphertext_hash(each["CiphertextBlob"]) for each in made if each is not None]
    assert [line["ciphertext"] for line in all_lines] == hashes * 2
    own = ("request_id", "time", "microseconds", "previous", "ciphertext")
    assert len({json.dumps({k: v for k, v in line.items() if k not in own}) for line in lines}) == 1
    assert lines[-1]["grant"] == "me"
    assert lines[-1]["context_keys"] == ["tenant"]
    assert lines[-1]["recipient"].startswith("sha256:")


def test_reload_without_a_grant_drops_its_decisions(keyring: Path, socket_path: Path) -> None:
    """The request is refused on a connection that has sent it often before."""
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        assert set(codes(connection)) == {"OK"}
        (keyring.parent / "agent.toml").write_text(configuration(keyring, actions="kms:Decrypt"))
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done")
        assert set(codes(connection)) == {"Forbidden.NoPermission"}


@pytest.mark.parametrize("params", [GENERATE, SM2], ids=["RSA_2048", "EC_SM2"])
def test_disabled_and_rotated_keys_take_effect_at_reload(
    keyring: Path, socket_path: Path, params: dict[str, Any]
) -> None:
    """Remembered decisions about the key end with the reload."""
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        assert set(codes(connection, params=params)) == {"OK"}
        before = result(connection.call("GenerateAndExportDataKey", params))
        change(keyring, "rotate", "alias/a")
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done")
        after = result(connection.call("GenerateAndExportDataKey", params))
        assert before["KeyVersionId"] != after["KeyVersionId"]
        change(keyring, "disable", "alias/a")
        agent.signal(signal.SIGHUP)
        agent.wait_for("reload.done", count=2)
        assert set(codes(connection, params=params)) == {"Rejected.Disabled"}


def test_remembered_requests_count_against_the_rate(keyring: Path, socket_path: Path) -> None:
    """Ten requests a second are allowed, and as many again in the second that the test may take."""
    with (
        serving(keyring, socket_path, more="[limits]\nrequests_per_second = 10\n") as agent,
        RawConnection(agent.socket) as connection,
    ):
        ended = [code for _ in range(200) for code in codes(connection)]
    assert ended[:10] == ["OK"] * 10
    assert ended.count("Rejected.Throttling") > 500


def test_dry_run_is_not_mistaken_for_its_call(keyring: Path, socket_path: Path) -> None:
    """A remembered call is not mistaken for its dry run either."""
    with serving(keyring, socket_path) as agent, RawConnection(agent.socket) as connection:
        assert set(codes(connection)) == {"OK"}
        assert set(codes(connection, params=GENERATE | {"DryRun": True})) == {"DryRunOperationError"}
        assert set(codes(connection)) == {"OK"}
