"""The steps that handlers share: from a KeyId or a blob to a key that the caller may use, and from there to sealed bytes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm

from keyferry.ciphertext import ciphertext_hash
from keyferry.errors import KmsError, kms_error
from keyferry.parameters import ENCRYPTION_CONTEXT, Parameter, Values
from keyferry.secret import Secret, SecretMemory

from ..audit.entry import AuditEntry
from ..authz.caller import Caller
from ..authz.grants import carrying
from ..crypto import ciphertext_blob
from ..crypto.ciphertext_blob import SealError, plaintext_size
from ..keyring.keyring import Key, KeyVersion
from ..state import ServerState

__all__ = [
    "BlobEncryptor",
    "Context",
    "Job",
    "Request",
    "authorize",
    "find_key",
    "find_version",
    "no_permission",
    "open_blob",
    "plaintext_size",
    "require_usable",
    "sealing",
    "would_succeed",
]

Context = Mapping[str, str]

# One text for every reason why a ciphertext does not open: which one it was would help only somebody who tampers.
_DOES_NOT_OPEN: Final = (
    "CiphertextBlob: it is damaged, was made under another EncryptionContext, or was not made by this agent's keys."
)


class Job(NamedTuple):
    """A request that has been decided. `run` does it, in one go; `slow` says that it takes half a millisecond or more.

    `holds`, where there is one, returns whether this decision still holds, as far as time can change it: keys have dates.
    `repeatable`: `run` does an equal request, too, as long as the decision holds.
    """

    run: Callable[[], Any]
    slow: bool = False
    holds: Callable[[], bool] | None = None
    repeatable: bool = False


class Request(NamedTuple):
    """What a handler is given: who asks whom for what, and what to note for the record."""

    agent: ServerState
    caller: Caller
    action: str
    values: Values
    audited: AuditEntry

    def context(self, parameter: Parameter[dict[str, str]] = ENCRYPTION_CONTEXT) -> Context:
        """The EncryptionContext in a parameter; its keys are noted for the record."""
        context = self.values.get(parameter) or {}
        known = self.audited.context_keys
        self.audited.context_keys = (*known, *[key for key in context if key not in known]) if known else tuple(context)
        return context


def find_key(
    request: Request,
    parameter: Parameter[str],
    *,
    action: str | None = None,
    pin: str | None = None,
    context: Context | None = None,
) -> Key:
    """The key that a parameter names, if the caller may do `action` (by default the operation's own) with it.

    Raises `KmsError`.
    """
    agent, action = request.agent, action or request.action
    name = agent.plain_name(parameter, request.values.need(parameter))
    key = agent.keyring.by_alias.get(name) if name.startswith("alias/") else agent.keyring.keys.get(name)
    key = None if key is None or key.state() == "Deleted" else key
    if _grant(request, key, name, action, pin=pin, context=context) and key is not None:
        return key
    # A refused caller could measure a shorter way: the same is looked up whether the key exists or not.
    may = request.caller.granted.would_cover(action, agent.settings.names_of(name))
    if carrying(may, pin, context) and key is None:
        raise kms_error("Forbidden.AliasNotFound" if name.startswith("alias/") else "Forbidden.KeyNotFound")
    raise no_permission()


def find_version(
    request: Request, blob: bytes, *, action: str | None = None, pin: str | None = None, context: Context
) -> tuple[Key, KeyVersion]:
    """The key and version that a blob names, if the caller may do `action` (by default the operation's own) with the key.

    Raises `KmsError`.
    """
    action = action or request.action
    if blob:
        request.audited.ciphertext = ciphertext_hash(blob)
    try:
        version_id = ciphertext_blob.key_version_id(blob)
    except SealError:
        raise _does_not_open() from None
    key, version = request.agent.keyring.by_version.get(version_id, (None, None))
    key = None if key is None or key.state() == "Deleted" else key
    if _grant(request, key, version_id, action, pin=pin, context=context) and key is not None and version is not None:
        request.audited.key_version_id = version.version_id
        return key, version
    if carrying(request.caller.granted.with_action(action), pin, context) and key is None:
        raise kms_error("Forbidden.KeyVersionNotFound")
    raise no_permission()


def authorize(request: Request, key: Key, action: str, *, pin: str | None, context: Context | None) -> None:
    """Refuse a caller without a grant for the action on the key. Raises `Forbidden.NoPermission`."""
    if not _grant(request, key, key.key_id, action, pin=pin, context=context):
        raise no_permission()


def _grant(
    request: Request, key: Key | None, name: str, action: str, *, pin: str | None, context: Context | None
) -> bool:
    """Whether some grant covers the action on the key; the audit entry names both, the key also where none does."""
    agent, granted = request.agent, request.caller.granted
    if key is None:
        may = granted.covering(action, name, None)
    else:
        request.audited.key_id = key.key_id
        may = granted.covering(action, key.key_id, functools.partial(agent.names_of_key, key))
    grant = carrying(may, pin, context)
    if grant is None:
        return False
    request.audited.grant = grant.name
    request.audited.by_program = bool(grant.program)
    return True


def require_usable(key: Key, version: KeyVersion | None = None) -> None:
    """Refuse a key that is not enabled, and a version that is disabled. Raises `Rejected.*`."""
    state = key.state()
    if state == "Deleted":  # in this very moment
        raise kms_error("Forbidden.KeyNotFound")
    if state != "Enabled":
        raise kms_error(f"Rejected.{state}")
    if version is not None and version.disabled:
        raise kms_error("Rejected.Disabled", f"Only the key version {version.version_id} is: others can be used.")


class BlobEncryptor(NamedTuple):
    """What makes a CiphertextBlob of bytes in secret memory."""

    bound: ciphertext_blob.Bound
    material: Secret
    scratch: SecretMemory

    def __call__(self, data: memoryview) -> bytes:
        """Seal it. Raises `KmsError` where this system does not offer the algorithms of the key."""
        with self.material.lend() as cmk:
            try:
                return self.bound.seal(cmk, data, self.scratch)
            except UnsupportedAlgorithm:
                raise _not_offered() from None


def sealing(key: Key, version: KeyVersion, context: Context, scratch: SecretMemory) -> BlobEncryptor:
    """What seals under this version of a key and this context: all that does not depend on what is sealed is done here."""
    bound = ciphertext_blob.bind(key.key_spec, version.version_id, key.key_id, context)
    return BlobEncryptor(bound, version.material, scratch)


def open_blob(
    key: Key, version: KeyVersion, context: Context, blob: bytes, out: memoryview, scratch: SecretMemory
) -> None:
    """Open a CiphertextBlob into secret memory. Raises the one `InvalidParameter` for all that does not open, and
    `UnsupportedOperation` where this system does not offer the algorithms of the key.
    """
    with version.material.lend() as cmk:
        try:
            ciphertext_blob.open_into(key.key_spec, cmk, blob, key.key_id, context, out, scratch)
        except SealError:
            raise _does_not_open() from None
        except UnsupportedAlgorithm:
            raise _not_offered() from None


def would_succeed() -> KmsError:
    """How a DryRun ends that found nothing wrong."""
    return kms_error("DryRunOperationError")


def no_permission() -> KmsError:
    """All that a caller without a grant ever learns."""
    return kms_error("Forbidden.NoPermission")


def _not_offered() -> KmsError:
    return kms_error(
        "UnsupportedOperation", "This system's OpenSSL does not offer the algorithms of the key's KeySpec."
    )


def _does_not_open() -> KmsError:
    return kms_error("InvalidParameter", _DOES_NOT_OPEN)
