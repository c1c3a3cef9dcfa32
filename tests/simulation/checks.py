"""The checks at the end of a simulation: of every request and answer, the audit log, and leaked resources."""

import base64
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from reference.blob_decoder import SUITES, associated_data

from keyferry.errors import CODES

from . import fixtures
from .clients import Client, Sent
from .connection_trace import AgentConnection, Answer
from .fixtures import EPOCH, RINGS, MasterKey, Ring, Version
from .oracle import expected_outcome
from .requests import GeneratedRequest
from .world import World

__all__ = ["check_clients", "check_record"]

_DRAIN: Final = 10.0
_GRACE_AND_MORE: Final = 10.0 + 4.0
"""Seconds that a drain may take: its grace, and the end of a thread that started in it."""
_LONGEST_GARBAGE: Final = 16
_AT_ONCE: Final = 2.5
_A_ROUND: Final = 0.01
"""Seconds of the round that is served when a connection is closed, without the delay of a hanging file system."""


def check_clients(world: World) -> None:
    """Every request was answered as it should have been, or there is a reason why it was not."""
    fresh: Counter[bytes] = Counter()
    for client in world.clients.values():
        if client.line is not None:
            _check_line(world, client, client.line, fresh)
        elif client.connected is not None and not (client.fault or world.stops or _accept_failed(world)):
            world.report_violation(f"{client.name} was never accepted")
    if any(count > 1 for count in fresh.values()):
        world.report_violation("a data key was given twice")
    if world.rate:
        _check_rate(world)


def _check_line(world: World, client: Client, line: AgentConnection, fresh: Counter[bytes]) -> None:
    if not line.sent.startswith(client.received):
        world.report_violation(f"{client.name} received what was not sent")
    closed = world.now if line.closed is None else line.closed
    if line.process_ended is not None and closed > line.process_ended + _AT_ONCE + world.stalled:
        world.report_violation(f"{client.name}: its process ended, and its connection did not")
    if line.closed is None:
        world.report_violation(f"{client.name}: its connection is still open in the agent")
    at = client.garbage_at
    unexplained = not _excuse(world, client, line, 0 if at is None else at) and not line.last_words
    if at is not None and line.received > at + _LONGEST_GARBAGE and unexplained:
        world.report_violation(f"{client.name} sent garbage, and was not told")
    for msgid, sent in client.asks.items():
        answer = line.answers.get(msgid)
        if answer is not None:
            _check_answer(world, line, sent, answer, fresh)
        elif not _excuse(world, client, line, sent.end):
            world.report_violation(f"{client.name}: {msgid} ({sent.ask.method}) was not answered")


def _check_rate(world: World) -> None:
    """Check that no user had more answers than the rate allows, in a burst and per second."""
    for uid in {client.uid for client in world.clients.values()}:
        served = sorted(
            (line.arrived(line.client.asks[msgid].end), answer.when)
            for line in world.all_connections
            if line.client.uid == uid
            for msgid, answer in line.answers.items()
            if answer.outcome not in ("Rejected.Throttling", "ServiceUnavailableTemporary")
        )
        latest = max((when for _, when in served), default=0.0)
        for place, (arrived, _) in enumerate(served):
            if len(served) - place > world.rate * (1 + latest - arrived) + 1:
                world.report_violation(f"user {uid} had {len(served) - place} answers in {latest - arrived:.2f} s")
                break


def _accept_failed(world: World) -> bool:
    return any(world.plan.injected[point] for point in ("accept", "ask who it is")) or world.was_starved


def _excuse(world: World, client: Client, line: AgentConnection, end: int) -> str:
    """Why a request was not answered, if there is a reason."""
    at = client.garbage_at
    return (
        ("never sent" if client.sent < end else "")
        or ("behind garbage" if at is not None and end > at else "")
        or ("refused" if line.refused or line.silenced else "")
        or client.fault
        or line.fault
        or ("the grace period was over" if world.grace_over else "")
        or ("closed for another" if _made_room(world, line) else "")
        or ("came too late" if world.stops and line.received < end else "")
    )


def _made_room(world: World, line: AgentConnection) -> bool:
    """Whether it was closed as another connection came, and its caller has no grant."""
    closed = line.closed
    return (
        closed is not None
        and not world.is_granted(line.client.uid, closed)
        and any(
            other is not line and other.opened <= closed <= other.opened + _A_ROUND + world.stalled
            for other in world.all_connections
        )
    )


def _check_answer(world: World, line: AgentConnection, sent: Sent, answer: Answer, fresh: Counter[bytes]) -> None:
    """Check an answer: the oracle has its outcome for some moment of the request's time, and its content is right."""
    ask, arrived = sent.ask, line.arrived(sent.end)
    if answer.outcome in _ALWAYS and _may_happen(world, answer):
        _check_error(world, line, answer)
        return
    seen = [
        adopted
        for place, adopted in enumerate(world.adopted)
        if adopted.since <= answer.when
        and (place + 1 == len(world.adopted) or world.adopted[place + 1].since >= arrived)
    ]
    times = (arrived, answer.when)
    possible = {expected_outcome(ask, line.client.uid, *adopted.state, when) for adopted in seen for when in times}
    if answer.outcome not in possible:
        world.report_violation(f"{line}: {ask.method} {ask.alias} gave {answer.outcome}; expected {sorted(possible)}")
    _check_decided(world, line, ask, answer)
    if answer.error is not None:
        _check_error(world, line, answer)
    elif answer.result is not None:
        try:
            _check_result(ask, answer.result, fresh)
            _check_key(ask, answer.result, [RINGS[adopted.ring] for adopted in seen])
        except Exception as error:
            world.report_violation(f"{line}: {ask.method} has a wrong result: {error!r}")


def _check_decided(world: World, line: AgentConnection, ask: GeneratedRequest, answer: Answer) -> None:
    """Nothing that was decided before a reload, or before a key's date, is done after it: not queued, recalled or waiting."""
    fields = world.record.lines.get(answer.request_id)
    if fields is None:
        return
    recorded = datetime.fromisoformat(fields["time"]).timestamp() - EPOCH
    possible = {
        expected_outcome(ask, line.client.uid, *adopted.state, when)
        for adopted in world.in_force(recorded)
        for when in (recorded, recorded + 0.001)
    }
    if answer.outcome not in possible:
        was = f"is recorded at {recorded:.3f} as {answer.outcome}"
        world.report_violation(f"{line}: {ask.method} {ask.alias} {was}, when it was {sorted(possible)}")


_ALWAYS: Final = {"ServiceUnavailableTemporary", "Rejected.Throttling", "InternalFailure"}


def _may_happen(world: World, answer: Answer) -> bool:
    if answer.outcome == "InternalFailure":
        return world.plan.injected["thread"] > 0
    return world.rate > 0 if answer.outcome == "Rejected.Throttling" else answer.request_id in world.record.failed


def _check_error(world: World, line: AgentConnection, answer: Answer) -> None:
    error = answer.error or {}
    known = CODES.get(error.get("Code", ""))
    if error.keys() != {"Code", "Message", "RequestId", "HttpStatus"} or known is None:
        world.report_violation(f"{line}: not a documented error: {error}")
    elif error["HttpStatus"] != known.http_status:
        world.report_violation(f"{line}: {error['Code']} with status {error['HttpStatus']}")


def _check_result(ask: GeneratedRequest, result: Mapping[str, Any], fresh: Counter[bytes]) -> None:
    opened = None
    if ask.method in ("DescribeKey", "ListKeys", "ListAliases", "GetAgentStatus"):
        return
    if ask.method == "ReEncrypt":
        assert ask.blob is not None
        opened = _open(result, "DestinationKeyId", "DestinationKeyVersionId", ask.destination_context)
        assert opened == ask.blob.plaintext, "another plaintext"
        assert (result["KeyId"], result["KeyVersionId"]) == (ask.blob.key.key_id, ask.blob.version.version_id)
        return
    if "CiphertextBlob" in result:
        opened = _open(result, "KeyId", "KeyVersionId", ask.context)
    if ask.blob is not None:
        assert opened is None
        opened = ask.blob.plaintext
        assert (result["KeyId"], result["KeyVersionId"]) == (ask.blob.key.key_id, ask.blob.version.version_id)
    assert opened is not None
    if ask.method.startswith("Generate"):
        assert len(opened) == ask.size, "another length"
        if ask.size >= 16:
            fresh[opened] += 1
    if ask.method == "Encrypt":
        assert opened == ask.plaintext, "another plaintext"
    if ask.method in ("GenerateDataKey", "Decrypt"):
        assert base64.b64decode(result["Plaintext"]) == opened, "another plaintext"
    else:
        assert "Plaintext" not in result
    if ask.to:
        assert fixtures.recipients()[ask.to].unwrap(result["ExportedDataKey"]) == opened, "another data key"


def _check_key(ask: GeneratedRequest, result: Mapping[str, Any], rings: list[Ring]) -> None:
    """Check that the ciphertext is under the primary version of the named key in one of the keyrings of the time."""
    if "CiphertextBlob" not in result:
        return
    prefix = "Destination" if ask.method == "ReEncrypt" else ""
    primary = [
        (entry.key.key_id, entry.primary.version_id) for ring in rings for entry in ring if ask.alias in entry.aliases
    ]
    assert (result[f"{prefix}KeyId"], result[f"{prefix}KeyVersionId"]) in primary, "not the primary version"


def _open(result: Mapping[str, Any], key_field: str, version_field: str, context: Mapping[str, str]) -> bytes:
    """The plaintext of a blob in an answer, under the key and version that the answer names."""
    key, version = fixtures.key_of_version(result[version_field])
    assert result[key_field] == key.key_id, "another key's version"
    return _open_blob(key, version, context, base64.b64decode(result["CiphertextBlob"]))


def _open_blob(key: MasterKey, version: Version, context: Mapping[str, str], blob: bytes) -> bytes:
    """As `blob_decoder.open_blob`, which takes milliseconds for SM4, over another library's primitives."""
    header, salt, commitment, ciphertext, tag = blob[:37], blob[37:69], blob[69:101], blob[101:-16], blob[-16:]
    assert header == version.version_id.encode() + b"\x01", "another header"
    suite = SUITES[key.spec]
    digest = hashes.SM3() if key.spec == "Aliyun_SM4" else hashes.SHA256()
    size = suite.key_size
    okm = HKDF(digest, size + 32, salt, suite.info).derive(version.material)
    assert okm[size:] == commitment, "another commitment"
    algorithm = algorithms.SM4(okm[:size]) if key.spec == "Aliyun_SM4" else algorithms.AES(okm[:size])
    decryptor = Cipher(algorithm, modes.GCM(bytes(12), tag)).decryptor()
    decryptor.authenticate_additional_data(associated_data(header, key.key_id, context))
    return decryptor.update(ciphertext) + decryptor.finalize()


def check_record(world: World) -> None:
    """One line for each answer, and none but for requests that the agent had received."""
    world.record.check(cut_off=world.record.may_be_cut_off)
    lines = {line.client.pid: line for line in world.all_connections}
    recorded: Counter[int] = Counter()
    answers = {answer.request_id: answer for line in world.all_connections for answer in line.answers.values()}
    for request_id, fields in world.record.lines.items():
        line = lines.get(fields["pid"])
        if line is None:
            world.report_violation(f"recorded of an unknown caller: {fields}")
            continue
        recorded[line.client.pid] += 1
        if request_id not in answers and not (
            line.fault or line.client.fault or world.grace_over or _made_room(world, line)
        ):
            world.report_violation(f"{line}: recorded, and not answered: {fields['operation']} {fields['outcome']}")
    for pid, count in recorded.items():
        line = lines[pid]
        received = sum(sent.end <= line.received for sent in line.client.asks.values())
        if count > received:
            world.report_violation(f"{line}: {count} lines of {received} requests")


def check_end(world: World, left: Mapping[str, Any]) -> None:
    """Check that the agent ended in time and notified the manager. `left`: resources that must be released."""
    for what, value in left.items():
        if value:
            world.report_violation(f"{what} left: {value}")
    if not world.stops or world.ended is None:
        return
    took = world.ended - world.stops[0]
    if took > _GRACE_AND_MORE + world.stalled:
        world.report_violation(f"the drain took {took:.1f} s")
    if len(world.stops) > 1 and world.ended - world.stops[1] > _AT_ONCE + world.stalled:
        world.report_violation(f"it was told to stop at once, and took {world.ended - world.stops[1]:.1f} s")
    if world.grace_over and len(world.stops) < 2 and took < _DRAIN:
        world.report_violation(f"the grace was over after {took:.1f} s")
    _check_told(world)


def _check_told(world: World) -> None:
    if not world.watchdog or world.plan.injected["tell the manager"]:
        return
    told = [(when, text.split("\n")[0]) for when, text in world.told]
    states = [text for _, text in told if text != "WATCHDOG=1"]
    if states[:1] != ["READY=1"] or "STOPPING=1" not in states:
        world.report_violation(f"the manager was told {states}")
    alive = [when for when, text in told if text == "WATCHDOG=1" and when <= world.stops[0]]
    for before, after in pairwise([*alive, world.stops[0]]):
        if after - before > world.watchdog + world.stalled:
            world.report_violation(f"the watchdog was not fed for {after - before:.1f} s")
