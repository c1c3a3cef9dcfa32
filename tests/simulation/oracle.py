"""A second judge of every request, much simpler than the agent, with which it shares no code.

It implements the documentation of operations, grants and states; keyring and configuration are plain data to it.
"""

from collections.abc import Callable, Mapping
from typing import Final

from . import fixtures
from .fixtures import Blob, Grant, Ring, RingKey
from .requests import GeneratedRequest

__all__ = ["expected_outcome"]

_PLAIN: Final = "plaintext"
_DRY: Final = {
    "OK": "DryRunOperationError",
    "InvalidParameter": "ValidationError",
    "Forbidden.NoPermission": "AccessDeniedError",
}


def expected_outcome(ask: GeneratedRequest, uid: int, ring: Ring, grants: tuple[Grant, ...], when: float) -> str:
    """The outcome of a request that this user makes at a time: `OK`, or the code of the error."""
    code = ask.always
    if not code:
        try:
            _JUDGES[ask.method](_Case(ask, uid, ring, grants, when))
            code = "OK"
        except _Refused as refused:
            code = refused.code
    return _DRY.get(code, code) if ask.dry else code


class _Refused(Exception):
    def __init__(self, code: str) -> None:
        self.code = code


class _Case:
    """A request, before keys and grants as they are at its time."""

    def __init__(self, ask: GeneratedRequest, uid: int, ring: Ring, grants: tuple[Grant, ...], when: float) -> None:
        self.ask = ask
        self._present = [entry for entry in ring if not (entry.delete_date and when >= fixtures.DELETED_AFTER)]
        self._mine = [grant for grant in grants if grant.uid == uid]

    def may(
        self,
        action: str,
        names: tuple[str, ...] | None = None,
        pin: str | None = None,
        context: Mapping[str, str] | None = None,
    ) -> None:
        """Refuse who has no grant."""
        if not any(_covers(grant, action, names, pin, context) for grant in self._mine):
            raise _Refused("Forbidden.NoPermission")

    def named(self, action: str, pin: str | None, context: Mapping[str, str] | None) -> RingKey:
        """The key that the request names."""
        found = next((entry for entry in self._present if self.ask.alias in entry.aliases), None)
        self.may(action, _names(found) or (self.ask.alias,), pin, context)
        if found is None:
            raise _Refused("Forbidden.AliasNotFound")
        return found

    def opening(self, action: str, pin: str | None) -> RingKey:
        """The key that the request's blob is of."""
        assert self.ask.blob is not None
        found = _holding(self._present, self.ask.blob)
        self.may(action, _names(found), pin, self.ask.context)
        if found is None:
            raise _Refused("Forbidden.KeyVersionNotFound")
        return found

    def opens(self) -> None:
        """Refuse a blob that does not open."""
        blob = self.ask.blob
        if blob is None or not blob.opens or dict(blob.context) != dict(self.ask.context):
            raise _Refused("InvalidParameter")


def _names(entry: RingKey | None) -> tuple[str, ...] | None:
    return None if entry is None else (entry.key.key_id, *entry.aliases)


def _usable(*entries: RingKey) -> None:
    for entry in entries:
        if entry.state != "Enabled":
            raise _Refused(f"Rejected.{entry.state}")


def _seals(case: _Case, pin: str | None) -> None:
    _usable(case.named(case.ask.method, pin, case.ask.context))


def _opens(case: _Case, pin: str | None) -> None:
    _usable(case.opening(case.ask.method, pin))
    case.opens()


def _re_encrypts(case: _Case) -> None:
    case.may("ReEncryptTo")
    source = case.opening("ReEncryptFrom", None)
    destination = case.named("ReEncryptTo", None, case.ask.destination_context)
    if destination is not source or dict(case.ask.context) != dict(case.ask.destination_context):
        case.named("ReEncryptTo", _PLAIN, case.ask.destination_context)
        case.opening("ReEncryptFrom", _PLAIN)
    _usable(source, destination)
    case.opens()


_JUDGES: Final[Mapping[str, Callable[[_Case], object]]] = {
    "GetAgentStatus": lambda _case: None,
    "ListKeys": lambda case: case.may("ListKeys"),
    "ListAliases": lambda case: case.may("ListAliases"),
    "DescribeKey": lambda case: case.named("DescribeKey", None, None),
    "GenerateAndExportDataKey": lambda case: _seals(case, case.ask.to),
    "GenerateDataKey": lambda case: _seals(case, _PLAIN),
    "GenerateDataKeyWithoutPlaintext": lambda case: _seals(case, None),
    "Encrypt": lambda case: _seals(case, _PLAIN),
    "Decrypt": lambda case: _opens(case, _PLAIN),
    "ExportDataKey": lambda case: _opens(case, case.ask.to),
    "ReEncrypt": _re_encrypts,
}


def _holding(present: list[RingKey], blob: Blob) -> RingKey | None:
    """The key, if the keyring has the version that the blob names."""
    for entry in present:
        if blob.version in entry.key.versions[: entry.versions]:
            return entry
    return None


def _covers(
    grant: Grant, action: str, names: tuple[str, ...] | None, pin: str | None, context: Mapping[str, str] | None
) -> bool:
    return (
        any(_like(pattern, action) for pattern in grant.actions)
        and (names is None or any(_like(pattern, name) for pattern in grant.keys for name in names))
        and (not grant.recipients or pin is None or _same_key(pin, grant.recipients))
        and (context is None or all(context.get(key) == value for key, value in grant.context.items()))
    )


def _like(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _same_key(to: str, allowed: tuple[str, ...]) -> bool:
    # Both hashes of RSA go to the same key.
    return to[:3] in {algorithm[:3] for algorithm in allowed}
