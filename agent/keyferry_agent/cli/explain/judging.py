"""Explain the effect of each grant on a request: pure functions, whose results agree with the agent's decisions."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from keyferry.operations import OPERATIONS
from keyferry.parameters import ENCRYPTION_CONTEXT, PUBLIC_KEY_BLOB

from ...audit.log import MAX_KEY_CHARACTERS
from ...authz.grants import NEVER_WITH_RECIPIENTS, PLAINTEXT, SELECTORS, Grant
from ...peer import Peer

__all__ = ["EXPORTS", "WITHOUT_CONTEXT", "WITHOUT_KEY", "Decision", "Question", "Verdict", "decide", "mismatch"]

WITHOUT_CONTEXT: Final = frozenset(
    operation.action
    for operation in OPERATIONS.values()
    if not any(name.endswith(ENCRYPTION_CONTEXT.name) for name in operation.parameters)
)
WITHOUT_KEY: Final = frozenset({"kms:ListKeys", "kms:ListAliases", "kms:GetAgentStatus"})
"""Actions that do not name a key. A grant covers them with any list of keys."""
EXPORTS: Final = frozenset(
    operation.action for operation in OPERATIONS.values() if PUBLIC_KEY_BLOB.name in operation.parameters
)
"""Actions that export a data key to a recipient."""
_RE_ENCRYPTS: Final = frozenset({"kms:ReEncryptFrom", "kms:ReEncryptTo"})
_NO_SUCH_NUMBER: Final = -1


class Question(NamedTuple):
    """A request to judge: may the caller perform an action on a key?

    `names`: all names of the key, or None if they are unknown. `fingerprint`: the recipient's fingerprint, if one is named.
    `context_keys`: replaces `context` if only the keys of the EncryptionContext are known, not the values.
    `unknown`: the selectors for which the caller's evidence is unknown. `stays`: whether ReEncrypt keeps the key.
    """

    peer: Peer
    action: str
    key: str
    names: tuple[str, ...] | None
    fingerprint: str | None = None
    context: Mapping[str, str] = {}
    context_keys: tuple[str, ...] | None = None
    unknown: frozenset[str] = frozenset()
    stays: bool = True

    @property
    def recipient(self) -> str | None:
        """Return the recipient that the agent judges: `PLAINTEXT` if the caller learns or chooses the data key."""
        if self.action in NEVER_WITH_RECIPIENTS or (self.action in _RE_ENCRYPTS and not self.stays):
            return PLAINTEXT
        return self.fingerprint if self.action in EXPORTS else None


class Verdict(NamedTuple):
    """The effect of one grant on a question. `why`: the first mismatch; empty if the grant allows the request.

    `recipients`: the only recipients for which the grant allows it; None for any. `conditions`: unknown facts that must be true
    for the grant to allow it. `file`: the grant's file in the folder of grants; None if the configuration has the grant.
    """

    grant: str
    why: str
    recipients: tuple[str, ...] | None = None
    conditions: tuple[str, ...] = ()
    file: Path | None = None

    def __str__(self) -> str:
        grant = self.grant if self.file is None else f"{self.grant} ({self.file})"
        if self.why:
            return f"{grant}: {self.why}"
        recipients = f" for these recipients only: {', '.join(self.recipients)}" if self.recipients is not None else ""
        return f"{grant}: allows it{recipients}{''.join(f', if {condition}' for condition in self.conditions)}"


class Decision(NamedTuple):
    """The effect of all grants on a question."""

    question: Question
    verdicts: list[Verdict]

    @property
    def allowing(self) -> list[Verdict]:
        """Return the verdicts of the grants that allow the request."""
        return [verdict for verdict in self.verdicts if not verdict.why]

    @property
    def recipients(self) -> tuple[str, ...] | None:
        """Return the only recipients for which grants allow the request; None if a grant allows any, or if all refuse it."""
        if not self.allowing or any(verdict.recipients is None for verdict in self.allowing):
            return None
        return tuple(sorted({fingerprint for verdict in self.allowing for fingerprint in verdict.recipients or ()}))

    def __str__(self) -> str:
        subject = f"{self.question.action} on {self.question.key}"
        if not self.allowing:
            status = ", but every caller is answered without the counters"
            return f"Refused: {subject}{status if self.question.action == 'kms:GetAgentStatus' else ''}"
        if self.recipients is not None:
            return f"Allowed for these recipients only: {', '.join(self.recipients)}: {subject}"
        if all(verdict.conditions for verdict in self.allowing):
            return f"Allowed under a condition: {subject}"
        return f"Allowed: {subject}"


def decide(grants: Iterable[Grant], question: Question) -> Decision:
    """Return the verdict of every grant on a question."""
    return Decision(question, [_judge(grant, question)._replace(file=grant.file) for grant in grants])


def mismatch(
    grant: Grant,
    peer: Peer,
    action: str,
    names: Iterable[str],
    fingerprint: str | None,
    context: Mapping[str, str] | None,
) -> str | None:
    """Return a message about the first part of a grant that does not match, or None if the grant allows the request."""
    for selector, value in grant.to.items():
        if not SELECTORS[selector](peer, value):
            return f"to.{selector}: the grant is to {_number(value)}; the caller's is {_evidence(peer, selector)}"
    if not grant.has_action(action):
        return f"actions: {action} is not one of {', '.join(grant.actions)}"
    names = list(names)
    if not grant.has_key(names):
        return f"keys: {', '.join(names)} does not match {', '.join(grant.keys)}"
    if not grant.has_recipient(fingerprint):
        prohibition = f"a grant with recipients never covers {action}: the caller would learn or choose a data key"
        return f"recipients: {prohibition if fingerprint == PLAINTEXT else f'{fingerprint} is not in the list'}"
    if not grant.has_context(context):
        missing_pairs = {
            key: value for key, value in grant.encryption_context.items() if (context or {}).get(key) != value
        }
        return f"encryption_context: the grant requires {', '.join(f'{key}={value}' for key, value in missing_pairs.items())}"
    return None


def _judge(grant: Grant, question: Question) -> Verdict:
    conditions: list[str] = []
    peer = _completed(question.peer, grant, question.unknown, conditions)
    names: Sequence[str] = question.names if question.names is not None else grant.keys
    if question.action in WITHOUT_KEY:
        names = grant.keys
    elif question.names is None:
        conditions.append(f"the key is one of {', '.join(grant.keys)}, which is not recorded")
    context: Mapping[str, str] | None = question.context
    if question.action in WITHOUT_CONTEXT:
        context = None
    elif question.context_keys is not None:
        context = {
            key: value
            for key, value in grant.encryption_context.items()
            if key[:MAX_KEY_CHARACTERS] in question.context_keys
        }
        conditions += [f"{key} is {value}, as values are not recorded" for key, value in context.items()]
    why = mismatch(grant, peer, question.action, names, question.recipient, context)
    if why is not None:
        return Verdict(grant.name, why)
    if question.action in EXPORTS and question.fingerprint is None and grant.recipients is not None:
        return Verdict(grant.name, "", tuple(sorted(grant.recipients)), tuple(conditions))
    if question.action in _RE_ENCRYPTS and grant.recipients is not None:
        conditions.append("ReEncrypt keeps the key and the EncryptionContext, as the grant has recipients")
    return Verdict(grant.name, "", None, tuple(conditions))


def _completed(peer: Peer, grant: Grant, unknown_selectors: frozenset[str], conditions: list[str]) -> Peer:
    """Return the caller with unknown evidence replaced by the grant's values. Adds a condition for each replacement."""
    for selector, value in grant.to.items():
        if selector not in unknown_selectors or SELECTORS[selector](peer, value):
            continue
        conditions.append(f"the caller's {selector} is {value}, which is not recorded")
        evidence = {"gids": peer.gids | {value}} if selector in ("gid", "group") else {selector: value}
        peer = peer._replace(**evidence)
    return peer


def _evidence(peer: Peer, selector: str) -> str:
    if selector in ("gid", "group"):
        return ", ".join(map(str, sorted(peer.gids))) or "none"
    value = getattr(peer, "uid" if selector == "user" else selector)
    return "not known" if value is None else str(value) or "missing"


def _number(value: object) -> str:
    return "a name that this host does not have" if value == _NO_SUCH_NUMBER else str(value)
