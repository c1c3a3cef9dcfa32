"""What grants have to do with a request: pure functions, which agree with what an agent decides."""

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
    each.action
    for each in OPERATIONS.values()
    if not any(name.endswith(ENCRYPTION_CONTEXT.name) for name in each.parameters)
)
WITHOUT_KEY: Final = frozenset({"kms:ListKeys", "kms:ListAliases", "kms:GetAgentStatus"})
"""Actions on no key in particular: a grant covers them, whatever its keys are."""
EXPORTS: Final = frozenset(each.action for each in OPERATIONS.values() if PUBLIC_KEY_BLOB.name in each.parameters)
"""Actions that export a data key to a recipient."""
_RE_ENCRYPTS: Final = frozenset({"kms:ReEncryptFrom", "kms:ReEncryptTo"})
_NO_SUCH_NUMBER: Final = -1


class Question(NamedTuple):
    """May a caller do something with a key?

    `names`: all that the key is called by; None where that is not known. `pin`: the recipient, if one is named.
    `context_keys`: the keys of an EncryptionContext whose values are not known, in the place of `context`.
    `unknown`: the selectors of which the caller's evidence is not known. `stays`: whether ReEncrypt keeps the key.
    """

    peer: Peer
    action: str
    key: str
    names: tuple[str, ...] | None
    pin: str | None = None
    context: Mapping[str, str] = {}
    context_keys: tuple[str, ...] | None = None
    unknown: frozenset[str] = frozenset()
    stays: bool = True

    @property
    def recipient(self) -> str | None:
        """The recipient as the agent judges it: `PLAINTEXT` where the caller learns or chooses the data key."""
        if self.action in NEVER_WITH_RECIPIENTS or (self.action in _RE_ENCRYPTS and not self.stays):
            return PLAINTEXT
        return self.pin if self.action in EXPORTS else None


class Verdict(NamedTuple):
    """What one grant has to do with a question. `why`: the first thing that does not match; empty where it allows.

    `recipients`: those that it allows it for only. `conditions`: what it depends on that is not known. `file`: the file in the
    folder of grants that has the grant; None for the configuration.
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
        only = f" for these recipients only: {', '.join(self.recipients)}" if self.recipients is not None else ""
        return f"{grant}: allows it{only}{''.join(f', if {condition}' for condition in self.conditions)}"


class Decision(NamedTuple):
    """What all grants have to do with a question."""

    question: Question
    verdicts: list[Verdict]

    @property
    def allowing(self) -> list[Verdict]:
        """The grants that allow it."""
        return [verdict for verdict in self.verdicts if not verdict.why]

    @property
    def recipients(self) -> tuple[str, ...] | None:
        """The recipients that it is allowed for only; None where some grant allows any, or none allows it."""
        if not self.allowing or any(verdict.recipients is None for verdict in self.allowing):
            return None
        return tuple(sorted({pin for verdict in self.allowing for pin in verdict.recipients or ()}))

    def __str__(self) -> str:
        about = f"{self.question.action} on {self.question.key}"
        if not self.allowing:
            status = ", but every caller is answered without the counters"
            return f"Refused: {about}{status if self.question.action == 'kms:GetAgentStatus' else ''}"
        if self.recipients is not None:
            return f"Allowed for these recipients only: {', '.join(self.recipients)}: {about}"
        if all(verdict.conditions for verdict in self.allowing):
            return f"Allowed under a condition: {about}"
        return f"Allowed: {about}"


def decide(grants: Iterable[Grant], question: Question) -> Decision:
    """Judge every grant."""
    return Decision(question, [_judge(grant, question)._replace(file=grant.file) for grant in grants])


def mismatch(
    grant: Grant, peer: Peer, action: str, names: Iterable[str], pin: str | None, context: Mapping[str, str] | None
) -> str | None:
    """The first thing in a grant that does not match; None where it allows."""
    for selector, value in grant.to.items():
        if not SELECTORS[selector](peer, value):
            return f"to.{selector}: the grant is to {_number(value)}; the caller's is {_evidence(peer, selector)}"
    if not grant.has_action(action):
        return f"actions: {action} is none of {', '.join(grant.actions)}"
    names = list(names)
    if not grant.has_key(names):
        return f"keys: {', '.join(names)} matches none of {', '.join(grant.keys)}"
    if not grant.has_recipient(pin):
        never = f"a grant with recipients never covers {action}: the caller would learn or choose a data key"
        return f"recipients: {never if pin == PLAINTEXT else f'{pin} is not in the list'}"
    if not grant.has_context(context):
        wanted = {key: value for key, value in grant.encryption_context.items() if (context or {}).get(key) != value}
        return f"encryption_context: it demands {', '.join(f'{key}={value}' for key, value in wanted.items())}"
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
    if question.action in EXPORTS and question.pin is None and grant.recipients is not None:
        return Verdict(grant.name, "", tuple(sorted(grant.recipients)), tuple(conditions))
    if question.action in _RE_ENCRYPTS and grant.recipients is not None:
        conditions.append("ReEncrypt keeps the key and the EncryptionContext, as the grant has recipients")
    return Verdict(grant.name, "", None, tuple(conditions))


def _completed(peer: Peer, grant: Grant, unknown: frozenset[str], conditions: list[str]) -> Peer:
    """Return a caller with the evidence that a grant asks for in the place of unknown evidence, and note that."""
    for selector, value in grant.to.items():
        if selector not in unknown or SELECTORS[selector](peer, value):
            continue
        conditions.append(f"the caller's {selector} is {value}, which is not recorded")
        evidence = {"gids": peer.gids | {value}} if selector in ("gid", "group") else {selector: value}
        peer = peer._replace(**evidence)
    return peer


def _evidence(peer: Peer, selector: str) -> str:
    if selector in ("gid", "group"):
        return ", ".join(map(str, sorted(peer.gids))) or "none"
    value = getattr(peer, "uid" if selector == "user" else selector)
    return "not known" if value is None else str(value)


def _number(value: object) -> str:
    return "a name that this host does not have" if value == _NO_SUCH_NUMBER else str(value)
