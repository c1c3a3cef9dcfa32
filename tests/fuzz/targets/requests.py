"""The agent behind the codec answers any request, or refuses it with a documented code. A caller without a grant gets the
answers of an agent without keys.
"""

import functools
import hashlib
import json
import select
import time
import uuid
from typing import Any

from reference import blob_decoder

from keyferry.declaration import result_to_wire
from keyferry.errors import CODES, KmsError, ProtocolError
from keyferry.operations import OPERATIONS
from keyferry.parameters import decode_base64
from keyferry.protocol import wire
from keyferry.secret import SecretMemory
from keyferry_agent import handlers
from keyferry_agent.audit import log
from keyferry_agent.audit.entry import AuditedRequest, blob_hash
from keyferry_agent.authz.caller import Caller
from keyferry_agent.authz.grants import Grant
from keyferry_agent.config.settings import Settings
from keyferry_agent.keyring.description import KeyDescription, KeyringDescription, VersionDescription
from keyferry_agent.keyring.keyring import Keyring, build_keyring, required_bytes
from keyferry_agent.peer import Peer
from keyferry_agent.state import ServerState

KEYS = [str(uuid.UUID(int=number)) for number in range(1, 5)]
VERSIONS = [str(uuid.UUID(int=256 + number)) for number in range(1, 5)]
_SPECS = ("Aliyun_AES_256", "Aliyun_SM4", "Aliyun_AES_256", "Aliyun_AES_256")
_STATES = ("Enabled", "Enabled", "Disabled", "PendingDeletion")
_DATE = "2026-01-31T12:00:00Z"
_FAR = "2999-01-31T12:00:00Z"
KNOWN, NOBODY = (Peer(uid=uid, gids=frozenset({uid}), pid=7, listener="default") for uid in (1000, 1001))
REQUEST_ID = "00000000-0000-4000-8000-000000000000"
_GRANTS = (
    Grant("wild", {"uid": 1000}, ("kms:*",), ("alias/a*", "acs:kms:*:0:alias/b-*")),
    Grant("context", {"uid": 1000}, ("kms:*Decrypt", "kms:ReEncrypt*"), ("*",), None, {"tenant": "acme"}),
    Grant("pinned", {"gid": 1000}, ("kms:*Export*",), (KEYS[2],), frozenset({"sha256:" + "0" * 64})),
    Grant("status", {"listener": "default", "uid": 1000}, ("kms:GetAgentStatus", "kms:List*"), ("*",)),
)


def material(version: int) -> bytes:
    """The material of a version here."""
    size = 16 if _SPECS[version] == "Aliyun_SM4" else 32
    return hashlib.shake_256(bytes([version])).digest(size)


def blob(version: int, context: dict[str, str], plaintext: bytes) -> bytes:
    """A CiphertextBlob that one of the keys opens."""
    spec = _SPECS[version]
    return blob_decoder.seal_blob(
        spec, material(version), VERSIONS[version], KEYS[version], context, plaintext, bytes(32)
    )


def _keyring(count: int) -> Keyring:
    described = [
        KeyDescription(
            key_id=KEYS[place],
            key_spec=_SPECS[place],
            created=_DATE,
            primary=VERSIONS[place],
            versions=(VersionDescription(VERSIONS[place], _DATE),),
            aliases=tuple(f"alias/{'abcd'[place]}-{number}" for number in range(2)),
            state=_STATES[place],
            origin="EXTERNAL",
            delete_date=_FAR if _STATES[place] == "PendingDeletion" else "",
        )
        for place in range(count)
    ]
    left = iter([material(place) for place in range(count)])

    def fill(view: memoryview) -> None:
        view[:] = next(left)

    content = KeyringDescription(tuple(described))
    return build_keyring(content, fill, SecretMemory(required_bytes(content), backing="mlock", require=False))


@functools.cache
def _agents() -> tuple[ServerState, ServerState]:
    """One with keys, and one without any."""
    settings = Settings(grants=_GRANTS, memory="prefer", memory_backing="mlock")
    return ServerState(settings, _keyring(len(KEYS))), ServerState(settings, _keyring(0))


def answered(request: wire.Request) -> dict[str, Any] | tuple[str, str]:
    """Return the answer of the agent with keys to a caller with many grants."""
    return _answered(_agents()[0], Caller(KNOWN), request)


def agent(data: bytes) -> None:
    """Check the messages of a client."""
    decoder = wire.Decoder()
    decoder.feed(data)
    try:
        for message in decoder.messages():
            if isinstance(message, wire.Request):
                _asked(message)
    except ProtocolError:
        return


def _asked(request: wire.Request) -> None:
    full, empty = _agents()
    outcome = _answered(full, Caller(KNOWN), request)
    if isinstance(outcome, dict):
        _right(request, outcome)
    refused, nothing = (_answered(each, Caller(NOBODY), request) for each in (full, empty))
    if request.method != "GetAgentStatus":  # granted to every caller, with nothing but the agent's condition
        assert isinstance(refused, tuple)
        assert refused == nothing, "a caller without a grant has learnt something of the keys"


def _answered(agent: ServerState, caller: Caller, request: wire.Request) -> dict[str, Any] | tuple[str, str]:
    """The result, or code and message, as a client reads them; the steps are those of a connection."""
    caller.refresh(agent.policy)
    prepared, digest = handlers.prepare(agent, caller, request.method, request.params), ""
    try:
        if isinstance(prepared.outcome, Exception):
            raise prepared.outcome
        result = prepared.outcome.run()
        digest = blob_hash(result)
        body = {**result_to_wire(result), "RequestId": REQUEST_ID}
        packed = wire.encode_response(request.msgid, None, body)
        outcome = "OK"
    except KmsError as error:
        assert error.code in CODES
        assert error.code != "InternalFailure"
        outcome = error.code
        body = {"Code": error.code, "Message": error.message, "RequestId": REQUEST_ID, "HttpStatus": error.http_status}
        packed = wire.encode_response(request.msgid, body, None)
    _recorded(AuditedRequest(caller.peer, REQUEST_ID, time.monotonic(), prepared.entry, outcome, digest), body)
    decoder = wire.Decoder(max_array=100)
    decoder.feed(packed)
    (answer,) = decoder.messages()
    assert isinstance(answer, wire.Response)
    assert answer.msgid == request.msgid
    if answer.error is not None:
        return answer.error["Code"], answer.error["Message"]
    assert answer.result == body
    return body


def _recorded(request: AuditedRequest, body: dict[str, Any]) -> None:
    operation, outcome = request.entry.operation, request.outcome
    line = f'{log._line("2026-11-25T00:00:00.000+00:00", log._of_peer(request.peer), request)}, "previous": "{"0" * 64}"}}\n'
    assert len(line.encode()) <= select.PIPE_BUF, "a pipe may take it in part"
    assert line.count("\n") == 1
    fields = json.loads(line)
    assert fields["outcome"] == outcome
    assert fields["level"] == ("info" if outcome in ("OK", "DryRunOperationError") else "warning")
    if "CiphertextBlob" in body:
        digest = hashlib.sha256(decode_base64(body["CiphertextBlob"])).hexdigest()
        name = "destination_ciphertext" if operation == "ReEncrypt" else "ciphertext"
        assert fields[name] == f"sha256:{digest}"
    elif outcome == "OK" and operation in ("Decrypt", "ExportDataKey"):
        assert len(fields["ciphertext"]) == len("sha256:") + 64


def _right(request: wire.Request, result: dict[str, Any]) -> None:
    """Check that another implementation opens new ciphertexts, and that opened ones were sealed so."""
    assert request.method in OPERATIONS
    if request.method not in ("Encrypt", "Decrypt", "GenerateDataKey"):
        return
    given = result.get("CiphertextBlob", request.params.get("CiphertextBlob"))
    sealed = decode_base64(given) if isinstance(given, str) else given
    place = VERSIONS.index(result["KeyVersionId"])
    context = request.params.get("EncryptionContext") or {}
    context = json.loads(context) if isinstance(context, str) else context
    assert isinstance(sealed, bytes)
    opened = blob_decoder.open_blob(_SPECS[place], material(place), KEYS[place], context, sealed)
    assert opened == decode_base64(result.get("Plaintext", request.params.get("Plaintext", "")))
