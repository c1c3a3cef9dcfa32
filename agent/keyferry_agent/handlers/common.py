"""Steps that handlers share: from a KeyId or a blob to a key that the caller may use, and from there to a CiphertextBlob."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

from cryptography.exceptions import UnsupportedAlgorithm

from keyferry.ciphertext import ciphertext_hash
from keyferry.declaration import Operation
from keyferry.errors import KmsError, kms_error
from keyferry.parameters import ENCRYPTION_CONTEXT, Parameter, Values
from keyferry.secret import Secret, SecretMemory

from ..audit.entry import AuditEntry
from ..authz.caller import Caller
from ..authz.grants import Grant, first_matching
from ..crypto import ciphertext_blob
from ..crypto.ciphertext_blob import BlobError
from ..keyring.keyring import Key, KeyVersion
from ..state import ServerState

__all__ = [
    "BlobDecryptor",
    "BlobEncryptor",
    "Context",
    "Job",
    "PreparedRequest",
    "Request",
    "authorize",
    "find_key",
    "find_version",
    "no_permission",
    "require_usable",
]

Context = Mapping[str, str]

# One text for every reason why a ciphertext does not decrypt: the actual reason would help only an attacker who tampers.
_DOES_NOT_DECRYPT: Final = (
    "CiphertextBlob: it is damaged, was made under another EncryptionContext, or was not made by this agent's keys."
)


class Job(NamedTuple):
    """The work of a request that has been decided. `run` does it synchronously, and returns the result.

    `offload`: `run` takes half a millisecond or more, so it runs in a thread. `holds`, unless it is None, returns whether the
    decision still holds, as far as time can change it: keys have deletion dates. `repeatable`: `run` also answers an equal
    request, as long as the decision holds. `verify` is the part of `run` that a DryRun checks, if there is one: it raises
    `KmsError`, and returns nothing.
    """

    run: Callable[[], Any]
    offload: bool = False
    holds: Callable[[], bool] | None = None
    repeatable: bool = False
    verify: Callable[[], None] | None = None


class PreparedRequest(NamedTuple):
    """A decided request: its job, or the error that refuses it, and its audit entry.

    An error other than `KmsError` is a fault of the agent. Any error refers to every frame that it passed through, so keep
    neither the error nor this object: a frame that refers to either lives until the next garbage collection.
    """

    outcome: Job | Exception
    entry: AuditEntry


@dataclass(slots=True)
class Request:
    """The argument of a handler: the agent, the caller, the operation and its checked parameters.

    The other attributes collect the fields of the audit entry while the request is decided.
    """

    agent: ServerState
    caller: Caller
    operation: Operation[..., Any]
    values: Values = field(init=False)
    grant: Grant | None = None
    key_id: str = ""
    key_version_id: str = ""
    destination_key_id: str = ""
    destination_key_version_id: str = ""
    recipient: str = ""
    context_keys: tuple[str, ...] = ()
    ciphertext: str = ""

    def context(self, parameter: Parameter[dict[str, str]] = ENCRYPTION_CONTEXT) -> Context:
        """Return the EncryptionContext in a parameter, and note its keys for the audit entry."""
        context = self.values.get(parameter) or {}
        keys = self.context_keys
        self.context_keys = (*keys, *[key for key in context if key not in keys]) if keys else tuple(context)
        return context

    def entry(self) -> AuditEntry:
        """Return the audit entry with the fields that are known so far."""
        grant = self.grant
        return AuditEntry(
            self.operation.name,
            "" if grant is None else grant.name,
            grant is not None and bool(grant.program),
            self.key_id,
            self.key_version_id,
            self.destination_key_id,
            self.destination_key_version_id,
            self.recipient,
            self.context_keys,
            self.ciphertext,
        )


def find_key(
    request: Request,
    parameter: Parameter[str],
    *,
    action: str | None = None,
    fingerprint: str | None = None,
    context: Context | None = None,
) -> Key:
    """Return the key that a parameter names, if a grant of the caller covers `action` (by default the operation's own) on it.

    Raises `KmsError`.
    """
    agent, action = request.agent, action or request.operation.action
    name = agent.plain_name(parameter, request.values.need(parameter))
    key = agent.keyring.by_alias.get(name) if name.startswith("alias/") else agent.keyring.keys.get(name)
    key = None if key is None or key.state() == "Deleted" else key
    if _grant(request, key, name, action, fingerprint=fingerprint, context=context) and key is not None:
        return key
    # A refused caller could measure a shorter way, so the look-ups are the same whether the key exists or not.
    grants = request.caller.granted.would_cover(action, agent.settings.names_of(name))
    if first_matching(grants, fingerprint, context) and key is None:
        raise kms_error("Forbidden.AliasNotFound" if name.startswith("alias/") else "Forbidden.KeyNotFound")
    raise no_permission()


def find_version(
    request: Request, blob: bytes, *, action: str | None = None, fingerprint: str | None = None, context: Context
) -> tuple[Key, KeyVersion]:
    """Return the key and version that a blob names, if a grant of the caller covers `action` on the key.

    `action` is by default the operation's own. Raises `KmsError`.
    """
    action = action or request.operation.action
    if blob:
        request.ciphertext = ciphertext_hash(blob)
    try:
        version_id = ciphertext_blob.key_version_id(blob)
    except BlobError:
        raise _does_not_decrypt() from None
    key, version = request.agent.keyring.by_version.get(version_id, (None, None))
    key = None if key is None or key.state() == "Deleted" else key
    if (
        _grant(request, key, version_id, action, fingerprint=fingerprint, context=context)
        and key is not None
        and version is not None
    ):
        request.key_version_id = version.version_id
        return key, version
    if first_matching(request.caller.granted.with_action(action), fingerprint, context) and key is None:
        raise kms_error("Forbidden.KeyVersionNotFound")
    raise no_permission()


def authorize(request: Request, key: Key, action: str, *, fingerprint: str | None, context: Context | None) -> None:
    """Raise `Forbidden.NoPermission` unless the caller has a grant for the action on the key."""
    if not _grant(request, key, key.key_id, action, fingerprint=fingerprint, context=context):
        raise no_permission()


def _grant(
    request: Request, key: Key | None, name: str, action: str, *, fingerprint: str | None, context: Context | None
) -> bool:
    """Return whether a grant covers the action on the key.

    The audit entry then names the grant. It names the key, if there is one, whether or not a grant covers the action.
    """
    agent, granted = request.agent, request.caller.granted
    if key is None:
        grants = granted.covering(action, name, None)
    else:
        request.key_id = key.key_id
        grants = granted.covering(action, key.key_id, functools.partial(agent.names_of_key, key))
    grant = first_matching(grants, fingerprint, context)
    if grant is None:
        return False
    request.grant = grant
    return True


def require_usable(key: Key, version: KeyVersion | None = None) -> None:
    """Raise `Rejected.*` for a key that is not enabled or a version that is disabled.

    Raises `Forbidden.KeyNotFound` for a key whose deletion date has come.
    """
    state = key.state()
    if state == "Deleted":  # its deletion date has come since the look-up
        raise kms_error("Forbidden.KeyNotFound")
    if state != "Enabled":
        raise kms_error(f"Rejected.{state}")
    if version is not None and version.disabled:
        raise kms_error("Rejected.Disabled", f"Only the key version {version.version_id} is: others can be used.")


class BlobEncryptor(NamedTuple):
    """Encrypts bytes in secret memory to a CiphertextBlob, under one key version and one EncryptionContext."""

    bound: ciphertext_blob.Bound
    material: Secret
    scratch: SecretMemory

    @classmethod
    def of(cls, request: Request, key: Key, context: Context) -> Self:
        """Return the encryptor for the primary version of a key. Does all work that does not depend on the plaintext."""
        version = key.primary
        bound = ciphertext_blob.bind(key.key_spec, version.version_id, key.key_id, context)
        return cls(bound, version.material, request.agent.scratch)

    def encrypt(self, data: memoryview) -> bytes:
        """Return the CiphertextBlob of `data`. Raises `KmsError` if this system does not offer the algorithms of the key."""
        with self.material.lend() as cmk:
            try:
                return self.bound.encrypt(cmk, data, self.scratch)
            except UnsupportedAlgorithm:
                raise _not_offered() from None


class BlobDecryptor(NamedTuple):
    """Decrypts one CiphertextBlob into secret memory, under the key version that it names and one EncryptionContext."""

    key: Key
    version: KeyVersion
    context: Context
    blob: bytes
    scratch: SecretMemory

    @property
    def size(self) -> int:
        """The number of bytes of the plaintext."""
        return ciphertext_blob.plaintext_size(self.blob)

    def decrypt_into(self, out: memoryview) -> None:
        """Decrypt the blob into `out`, which has `size` bytes of secret memory.

        Raises the same `InvalidParameter` for every blob that does not decrypt, and `UnsupportedOperation` if this system does
        not offer the algorithms of the key.
        """
        with self.version.material.lend() as cmk:
            try:
                ciphertext_blob.decrypt_into(
                    self.key.key_spec, cmk, self.blob, self.key.key_id, self.context, out, self.scratch
                )
            except BlobError:
                raise _does_not_decrypt() from None
            except UnsupportedAlgorithm:
                raise _not_offered() from None

    def verify(self) -> None:
        """Check that the blob decrypts, and wipe the plaintext. Raises as `decrypt_into` does."""
        with self.scratch.borrow(self.size) as plaintext:
            self.decrypt_into(plaintext)


def no_permission() -> KmsError:
    """Return the only error that a caller without a grant receives."""
    return kms_error("Forbidden.NoPermission")


def _not_offered() -> KmsError:
    return kms_error(
        "UnsupportedOperation", "This system's OpenSSL does not offer the algorithms of the key's KeySpec."
    )


def _does_not_decrypt() -> KmsError:
    return kms_error("InvalidParameter", _DOES_NOT_DECRYPT)
