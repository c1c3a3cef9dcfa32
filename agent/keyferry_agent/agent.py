"""What the agent holds while it runs: settings, keyring, secret scratch memory, counters; and what it knows of a caller."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from keyferry.errors import invalid_parameter
from keyferry.operations import Counters
from keyferry.parameters import KEY_ID
from keyferry.secret import SCRATCH_SIZES, Protection, SecretMemory

from .grants import Grant, to_caller
from .keyring.document import now
from .keyring.loaded import Key, Keyring
from .peer import Peer
from .settings import Settings

__all__ = ["SLOW_JOBS", "Agent", "Audited", "Caller"]

SLOW_JOBS: Final = 4
"""Threads for slow jobs. More than cores would only make each take longer; four is more than most agents' share."""
_SCRATCH: Final = (1 + SLOW_JOBS) * (sum(SCRATCH_SIZES) + SCRATCH_SIZES[0])
"""Bytes, 36 KiB: for each thread that works, one plaintext of any size, and the keys derived on the way beside it."""


@dataclass(slots=True)
class Audited:
    """What is to be said of one request, gathered on its way down. Only names and fingerprints: nothing secret."""

    request_id: str
    started: float
    operation: str = ""
    grant: str = ""
    key_id: str = ""
    key_version_id: str = ""
    recipient: str = ""
    context_keys: tuple[str, ...] = ()


class Caller:
    """One connection's peer, with the grants that are to it: looked up once, and again after a reload."""

    __slots__ = ("_counted", "_settings", "grants", "peer")

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.grants: Sequence[Grant] = ()
        self._settings: Settings | None = None
        self._counted: tuple[weakref.ref[Keyring], int] | None = None  # an idle caller must not keep old keys alive

    def refresh(self, settings: Settings) -> None:
        """Look the grants up, if these are other settings than the last time."""
        if self._settings is not settings:
            self._settings = settings
            self.grants = to_caller(settings.grants, self.peer)
            self._counted = None

    def count_keys(self, agent: "Agent") -> int:
        """How many keys some grant covers. Looked through once per keyring: a probe asks every few seconds."""
        if self._counted is None or self._counted[0]() is not agent.keyring:
            keys = agent.keyring.keys.values()
            names = (agent.names_of_key(key) for key in keys if self.grants)
            count = sum(any(grant.has_key(n) for grant in self.grants) for n in names)
            self._counted = weakref.ref(agent.keyring), count
        return self._counted[1]


@dataclass
class Count:
    """Running totals since the start."""

    connections: int = 0
    connections_total: int = 0
    requests_total: int = 0
    requests_refused: int = 0

    def snapshot(self) -> Counters:
        """The totals as GetAgentStatus answers them."""
        return Counters(self.connections, self.connections_total, self.requests_total, self.requests_refused)


@dataclass
class Agent:
    """The state of a running agent. Changes happen synchronously, between two awaits; I/O comes after."""

    settings: Settings
    keyring: Keyring
    scratch: SecretMemory = field(init=False)
    counters: Count = field(default_factory=Count)
    started_at: str = field(default_factory=now)
    draining: bool = False

    def __post_init__(self) -> None:
        require = self.settings.memory == "require"
        self.scratch = SecretMemory(_SCRATCH, backing=self.settings.memory_backing, require=require)

    @property
    def memory_protection(self) -> Protection:
        """How all of the agent's secret memory is protected: as its weakest part."""
        kinds: tuple[Protection, ...] = ("none", "mlock", "memfd_secret")
        return min(self.scratch.protection, self.keyring.memory.protection, key=kinds.index)

    def arn(self, resource: str) -> str:
        """The ARN of `key/ID` or `alias/NAME`."""
        return f"acs:kms:{self.settings.region}:{self.settings.account}:{resource}"

    def plain_name(self, key_id: str) -> str:
        """A key ID or alias from any form of KeyId. Raises `InvalidParameter` for an ARN that is not of this agent."""
        if not key_id.startswith("acs:"):
            return key_id
        prefix = self.arn("")
        if not key_id.startswith(prefix):
            raise invalid_parameter(
                KEY_ID.name, f"the ARN is not of this agent: expected {prefix}key/... or {prefix}alias/..."
            )
        kind, _, name = key_id.removeprefix(prefix).partition("/")
        if kind not in ("key", "alias") or not name or (kind == "key" and "/" in name):
            raise invalid_parameter(KEY_ID.name, "the ARN names neither a key nor an alias.")
        return name if kind == "key" else f"alias/{name}"

    def names_of(self, name: str) -> tuple[str, ...]:
        """All that a grant can call a key by of which only this name is known."""
        return (name, self.arn(name if name.startswith("alias/") else f"key/{name}"))

    def names_of_key(self, key: Key) -> list[str]:
        """All that a grant can call a key by: its ID, its aliases, and the ARNs of both."""
        names = [*self.names_of(key.key_id)]
        for alias in key.aliases:
            names += self.names_of(alias)
        return names
