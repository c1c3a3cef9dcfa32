"""From an operation to its answer, in terms of keyring, grants and crypto. Synchronous; knows no sockets and no trio.

A handler works in two steps. The first, on the event loop, decides: parameters, then the grant, then the key and its state.
It gives a `Job`, whose `run` is the second: the cryptography, in one go, with key bytes in secret memory only. The job says
whether it is slow; whoever serves then runs it in a thread.

To add an operation: declare it in `keyferry.operations`, write its handler here, name it in `HANDLERS`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from keyferry import __version__, operations
from keyferry.errors import KmsError, invalid_parameter, kms_error
from keyferry.parameters import (
    CIPHERTEXT_BLOB,
    DATA_KEY_SPECS,
    DRY_RUN,
    ENCRYPTION_CONTEXT,
    KEY_ID,
    KEY_SPEC,
    NUMBER_OF_BYTES,
    PUBLIC_KEY_BLOB,
    WRAPPING_ALGORITHM,
    WRAPPING_KEY_SPEC,
    Values,
    encode_base64,
)
from keyferry.secret import SecretMemory, fill_random
from keyferry.wire import PROTOCOL_VERSION

from .agent import Agent, Audited, Caller
from .crypto import seal, wrapping
from .crypto.public_key import PublicKeyError
from .crypto.seal import SealError
from .grants import PLAINTEXT, allows, may_name
from .keyring.loaded import Key, KeyVersion

__all__ = ["Job", "prepare"]

T = TypeVar("T")

_DEFAULT_DATA_KEY: Final = DATA_KEY_SPECS["AES_256"]

# One text for every reason why a ciphertext does not open: which one it was would help only somebody who tampers.
_DOES_NOT_OPEN: Final = (
    "CiphertextBlob: it is damaged, was made under another EncryptionContext, or was not made by this agent's keys."
)


class Job(NamedTuple):
    """A request that has been decided. `run` does it, in one go; `slow` says that it takes half a millisecond or more."""

    run: Callable[[], Any]
    slow: bool = False


class _Request(NamedTuple):
    """What a handler is given: who asks whom for what, and what to note for the record."""

    agent: Agent
    caller: Caller
    operation: operations.Operation
    values: Values
    audited: Audited

    @property
    def context(self) -> Mapping[str, str]:
        context: dict[str, str] | None = self.values.get(ENCRYPTION_CONTEXT)
        return {} if context is None else context


def prepare(agent: Agent, caller: Caller, method: str, params: Mapping[str, Any], audited: Audited) -> Job:
    """Decide a request: everything but the cryptography. Raises `KmsError`."""
    operation = operations.OPERATIONS.get(method)
    if operation is None:
        raise kms_error("InvalidAction.NotFound")

    def decide() -> Job:
        values = operation.check(params)
        audited.context_keys = tuple(values.get(ENCRYPTION_CONTEXT) or ())
        return HANDLERS[method](_Request(agent, caller, operation, values, audited))

    if not operation.dry_run or not _asks_for_dry_run(params):
        return decide()
    job = _dry(decide)
    return Job(lambda: _dry(job.run), job.slow)


# What DryRun makes of a refusal; other failures keep their own code.
_DRY_RUN_CODES: Final = {
    "MissingParameter": "ValidationError",
    "InvalidParameter": "ValidationError",
    "Forbidden.NoPermission": "AccessDeniedError",
}


def _asks_for_dry_run(params: Mapping[str, Any]) -> bool:
    try:
        return DRY_RUN.check(DRY_RUN.name, params.get(DRY_RUN.name) or False)
    except KmsError:
        return False  # refused with the other parameters


def _dry(step: Callable[[], T]) -> T:
    try:
        return step()
    except KmsError as error:
        code = _DRY_RUN_CODES.get(error.code)
        raise kms_error(code, error.message) if code else error from None


# --- the steps that handlers share ------------------------------------------------------------------------------------


def _find(request: _Request, key_id: str, action: str, *, pin: str | None, context: Mapping[str, str] | None) -> Key:
    """The key that a KeyId names, if the caller may do `action` with it. Raises `KmsError`."""
    agent, grants = request.agent, request.caller.grants
    name = agent.plain_name(key_id)
    key = agent.keyring.by_alias.get(name) if name.startswith("alias/") else agent.keyring.keys.get(name)
    if key is None or key.state() == "Deleted":
        if may_name(grants, action, agent.names_of(name), pin=pin, context=context):
            raise kms_error("Forbidden.AliasNotFound" if name.startswith("alias/") else "Forbidden.KeyNotFound")
        raise kms_error("Forbidden.NoPermission")
    _permit(request, key, action, pin=pin, context=context)
    return key


def _find_version(
    request: _Request, blob: bytes, action: str, *, pin: str | None, context: Mapping[str, str]
) -> tuple[Key, KeyVersion]:
    """The key and version that a blob names, if the caller may do `action` with the key. Raises `KmsError`."""
    try:
        version_id = seal.key_version_id(blob)
    except SealError:
        raise invalid_blob() from None
    key, version = request.agent.keyring.by_version.get(version_id, (None, None))
    if key is None or version is None or key.state() == "Deleted":
        if may_name(request.caller.grants, action, None, pin=pin, context=context):
            raise kms_error("Forbidden.KeyVersionNotFound")
        raise kms_error("Forbidden.NoPermission")
    _permit(request, key, action, pin=pin, context=context)
    return key, version


def invalid_blob() -> KmsError:
    """The one error for a CiphertextBlob that does not open."""
    return kms_error("InvalidParameter", _DOES_NOT_OPEN)


def _permit(request: _Request, key: Key, action: str, *, pin: str | None, context: Mapping[str, str] | None) -> None:
    grant = allows(request.caller.grants, action, request.agent.names_of_key(key), pin=pin, context=context)
    if grant is None:
        raise kms_error("Forbidden.NoPermission")
    request.audited.grant, request.audited.key_id = grant.name, key.key_id


def _usable(key: Key) -> None:
    state = key.state()
    if state != "Enabled":
        raise kms_error(f"Rejected.{state}")


def _recipient(request: _Request) -> wrapping.Recipient:
    """The public key that a data key is to be wrapped for. Raises `KmsError`."""
    values = request.values
    spec, algorithm = values.need(WRAPPING_KEY_SPEC), values.need(WRAPPING_ALGORITHM)
    way = wrapping.find(spec, algorithm)
    if way is None:
        raise invalid_parameter(
            WRAPPING_ALGORITHM.name, f"it does not go with this WrappingKeySpec; there are {wrapping.pairs()}."
        )
    try:
        recipient = wrapping.recipient(
            way, values.need(PUBLIC_KEY_BLOB), sm2_fallback=request.agent.settings.sm2_fallback == "gmssl"
        )
    except PublicKeyError as error:
        raise invalid_parameter(PUBLIC_KEY_BLOB.name, str(error)) from None
    except wrapping.WrappingError as error:
        raise kms_error("UnsupportedOperation", str(error)) from None
    request.audited.recipient = recipient.pin
    return recipient


def _fits(recipient: wrapping.Recipient, size: int, name: str) -> None:
    """Refuse a data key that the wrapping cannot carry, whose size comes from the named parameter. Raises `KmsError`."""
    way = recipient.wrapping
    if size > way.capacity:
        raise invalid_parameter(name, f"the data key has {size} bytes; {way.name} carries at most {way.capacity}.")


def _size(request: _Request) -> int:
    values = request.values
    return values.get(NUMBER_OF_BYTES) or values.get(KEY_SPEC) or _DEFAULT_DATA_KEY


def _seal(key: Key, version: KeyVersion, context: Mapping[str, str], data: memoryview, scratch: SecretMemory) -> bytes:
    with version.material.lend() as cmk:
        return seal.seal(key.key_spec, cmk, version.version_id, key.key_id, context, data, scratch)


def _open(
    key: Key, version: KeyVersion, context: Mapping[str, str], blob: bytes, out: memoryview, scratch: SecretMemory
) -> None:
    with version.material.lend() as cmk:
        try:
            seal.open_into(key.key_spec, cmk, blob, key.key_id, context, out, scratch)
        except SealError:
            raise invalid_blob() from None


def _would_succeed() -> KmsError:
    return kms_error("DryRunOperationError")


# --- one handler for each operation -----------------------------------------------------------------------------------


def _generate_and_export_data_key(request: _Request) -> Job:
    size, context = _size(request), request.context
    recipient = _recipient(request)
    _fits(recipient, size, NUMBER_OF_BYTES.name)
    key = _find(request, request.values.need(KEY_ID), request.operation.action, pin=recipient.pin, context=context)
    _usable(key)
    version, scratch = key.primary, request.agent.scratch
    request.audited.key_version_id = version.version_id
    if request.values.get(DRY_RUN):
        raise _would_succeed()

    def run() -> operations.GenerateAndExportDataKeyResult:
        with scratch.borrow(size) as data_key:
            fill_random(data_key)
            blob = _seal(key, version, context, data_key, scratch)
            exported = recipient.wrap(data_key)
        return operations.GenerateAndExportDataKeyResult(
            key.key_id, version.version_id, encode_base64(blob), encode_base64(exported)
        )

    return Job(run, slow=recipient.wrapping.slow)


def _export_data_key(request: _Request) -> Job:
    blob, context = request.values.need(CIPHERTEXT_BLOB), request.context
    recipient = _recipient(request)
    key, version = _find_version(request, blob, request.operation.action, pin=recipient.pin, context=context)
    _usable(key)
    request.audited.key_version_id = version.version_id
    scratch, dry_run = request.agent.scratch, request.values.get(DRY_RUN)

    def run() -> operations.ExportDataKeyResult:
        size = seal.plaintext_size(blob)
        with scratch.borrow(size) as data_key:
            _open(key, version, context, blob, data_key, scratch)
            _fits(recipient, size, CIPHERTEXT_BLOB.name)  # only now: a damaged blob is damaged, however long
            if dry_run:
                raise _would_succeed()
            exported = recipient.wrap(data_key)
        return operations.ExportDataKeyResult(key.key_id, version.version_id, encode_base64(exported))

    return Job(run, slow=recipient.wrapping.slow)


def _decrypt(request: _Request) -> Job:
    blob, context = request.values.need(CIPHERTEXT_BLOB), request.context
    key, version = _find_version(request, blob, request.operation.action, pin=PLAINTEXT, context=context)
    _usable(key)
    request.audited.key_version_id = version.version_id
    scratch, dry_run = request.agent.scratch, request.values.get(DRY_RUN)

    def run() -> operations.DecryptResult:
        with scratch.borrow(seal.plaintext_size(blob)) as plaintext:
            _open(key, version, context, blob, plaintext, scratch)
            if dry_run:
                raise _would_succeed()
            return operations.DecryptResult(key.key_id, version.version_id, encode_base64(plaintext))

    return Job(run)


def _describe_key(request: _Request) -> Job:
    key = _find(request, request.values.need(KEY_ID), request.operation.action, pin=None, context=None)
    metadata = operations.KeyMetadata(
        key_id=key.key_id,
        arn=request.agent.arn(f"key/{key.key_id}"),
        description=key.description,
        key_spec=key.key_spec,
        key_usage="ENCRYPT/DECRYPT",
        key_state=key.state(),
        origin=key.origin,
        protection_level="SOFTWARE",
        creator=request.agent.settings.account,
        creation_date=key.created,
        primary_key_version=key.primary.version_id,
        last_rotation_date=key.primary.created,
        automatic_rotation="Disabled",
        deletion_protection="Disabled",
        delete_date=key.delete_date,
        material_expire_time="",
    )
    return Job(lambda: operations.DescribeKeyResult(metadata))


def _get_agent_status(request: _Request) -> Job:
    agent, grants = request.agent, request.caller.grants
    counters = agent.counters if any(grant.has_action(request.operation.action) for grant in grants) else None
    status = operations.GetAgentStatusResult(
        version=__version__,
        protocol_version=PROTOCOL_VERSION,
        state="Draining" if agent.draining else "Serving",
        started_at=agent.started_at,
        keys=request.caller.count_keys(agent),
        keyring_loaded_at=agent.keyring.loaded_at,
        memory_protection=agent.memory_protection,
        counters=counters.snapshot() if counters else None,
    )
    return Job(lambda: status)


HANDLERS: Final[Mapping[str, Callable[[_Request], Job]]] = {
    "GenerateAndExportDataKey": _generate_and_export_data_key,
    "ExportDataKey": _export_data_key,
    "Decrypt": _decrypt,
    "DescribeKey": _describe_key,
    "GetAgentStatus": _get_agent_status,
}
