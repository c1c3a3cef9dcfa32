"""The state of a running agent: settings, keyring, secret scratch memory, counters, and the keys visible to each caller."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from keyferry.errors import invalid_parameter
from keyferry.operations import Counters
from keyferry.parameters import Parameter
from keyferry.secret import SCRATCH_SIZES, Protection, SecretMemory, whole_pages

from . import health
from .authz.grants import CallerGrants, Policy
from .config.settings import Settings
from .keyring.document import now
from .keyring.keyring import KEPT, Key, Keyring

__all__ = [
    "MAX_BATCH",
    "OFFLOAD_THREADS",
    "ServerState",
    "VisibleKeys",
    "locked_memory_needed",
]

_SHOWN_OTHERWISE: Final = (health.DRAINING, health.RELOAD_FAILED)
"""Conditions that `status` describes in other words."""
OFFLOAD_THREADS: Final = 4
"""Threads for offloaded jobs. More threads than cores would only slow each job; most agents may use fewer than four cores."""
_MAX_CACHED_GRANT_SETS: Final = 64
"""Sets of grants whose visible keys are cached. Callers with the same grants share one set."""
MAX_BATCH: Final = 32
"""Requests of one connection in one round."""
_SCRATCH_BYTES: Final = (1 + OFFLOAD_THREADS) * (sum(SCRATCH_SIZES) + SCRATCH_SIZES[0]) + SCRATCH_SIZES[1]
"""Each working thread needs space for one plaintext of any size and for the keys derived meanwhile (40 KiB, in whole pages).

The event loop's thread needs space for the padded message of RSA, too.
"""


def locked_memory_needed(keyring: int) -> str:
    """Return a sentence on how much locked memory an agent needs in all, if its keyring takes `keyring` bytes."""
    scratch = whole_pages(_SCRATCH_BYTES)
    total = scratch + 2 * keyring
    return (
        f"This agent needs {total // 1024} KiB of locked memory in all: {scratch // 1024} for its work, and twice "
        f"{keyring // 1024} for the keyring, which is there twice while it is read again"
    )


class VisibleKeys(NamedTuple):
    """The keys that a caller has a grant on, in the keyring's order, and their aliases."""

    keys: tuple[Key, ...]
    aliases: tuple[tuple[str, Key], ...]

    @classmethod
    def of(cls, keys: Iterable[Key]) -> Self:
        """Return these keys with their aliases."""
        visible_keys = tuple(keys)
        return cls(visible_keys, tuple((alias, key) for key in visible_keys for alias in key.aliases))


@dataclass
class RequestCounters:
    """Running totals since the start."""

    socket_connections: int = 0
    gateway_connections: int = 0
    connections_total: int = 0
    requests_total: int = 0
    requests_refused: int = 0
    notifications_total: int = 0
    connections_refused: int = 0
    reloads_failed: int = 0

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return self.socket_connections + self.gateway_connections

    def snapshot(self) -> Counters:
        """Return the totals in the form of a GetAgentStatus result."""
        return Counters(self.connections, self.connections_total, self.requests_total, self.requests_refused)


@dataclass
class ServerState:
    """The state of a running agent. State changes are synchronous, without an await; I/O comes after them."""

    settings: Settings
    keyring: Keyring
    scratch: SecretMemory = field(init=False)
    policy: Policy = field(init=False)
    counters: RequestCounters = field(default_factory=RequestCounters)
    started_at: str = field(default_factory=now)
    draining: bool = False
    generation: int = 0
    """How often settings and keyring were replaced. A decision of an earlier generation no longer holds."""
    on_adopt: list[Callable[[], None]] = field(default_factory=list)
    """Called after settings and keyring were replaced. A cache that refers to the old keyring is emptied by such a call."""
    reload_failure: str = ""
    """A message for the operator on the steps of the last reload that failed, and why; empty if none failed."""
    keyring_stale: bool = False
    """Whether the keyring's file was replaced after it was loaded, and the new file has not been opened."""
    unseal_absent: bool = False
    """Whether the file with the unseal secret is absent."""
    audit_fails: Callable[[], bool] = lambda: False
    """Returns whether the last write to the audit log failed."""
    _covered: dict[CallerGrants, VisibleKeys] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.policy = Policy(self.settings.grants)
        require = self.settings.memory == "require"
        self.scratch = SecretMemory(_SCRATCH_BYTES, backing=self.settings.memory_backing, require=require)

    def adopt(self, settings: Settings, keyring: Keyring) -> None:
        """Replace the settings and the keyring. The old keyring is wiped after the last request that uses it."""
        self.generation += 1
        self.settings, self.keyring, self.policy = settings, keyring, Policy(settings.grants)
        self._covered.clear()
        for forget in self.on_adopt:
            forget()

    def visible_keys(self, granted: CallerGrants) -> VisibleKeys:
        """Return the keys that these grants cover. Cached for each keyring, since probes and lists request them often."""
        grants = granted.grants
        visible_keys = self._covered.get(granted)
        if visible_keys is None:
            if len(self._covered) >= _MAX_CACHED_GRANT_SETS:
                self._covered.clear()
            keys = self.keyring.keys.values() if grants else ()
            visible_keys = self._covered[granted] = VisibleKeys.of(
                key for key in keys if any(grant.has_key(self.names_of_key(key)) for grant in grants)
            )
        expired_ids = self.keyring.gone()
        return (
            VisibleKeys.of(key for key in visible_keys.keys if key.key_id not in expired_ids)
            if expired_ids
            else visible_keys
        )

    @property
    def memory_protection(self) -> Protection:
        """The protection of the weakest part of the agent's secret memory."""
        kinds: tuple[Protection, ...] = ("none", "mlock", "memfd_secret")
        return min(self.scratch.protection, self.keyring.memory.protection, key=kinds.index)

    @property
    def conditions(self) -> list[str]:
        """The conditions that hold now (`health`), the most important first."""
        settings_with_conditions = {
            health.DRAINING: self.draining,
            health.SEALED: self.keyring.is_sealed,
            health.AUDIT_FAILING: self.audit_fails(),
            health.RELOAD_FAILED: bool(self.reload_failure),
            health.KEYRING_STALE: self.keyring_stale,
            health.UNSEAL_ABSENT: self.unseal_absent,
        }
        return [name for name in health.MESSAGES if settings_with_conditions[name]]

    @property
    def state(self) -> str:
        """The state in one word: Serving, Sealed, Refusing or Draining."""
        return health.state(self.conditions, is_refusing=self.settings.audit.on_failure == "refuse")

    def status(self) -> str:
        """Return the agent's state in one line for an operator."""
        keys, connections = len(self.keyring.keys), self.counters.connections
        failure = f"{self.reload_failure}; " if self.reload_failure else ""
        conditions = [health.MESSAGES[name] for name in self.conditions if name not in _SHOWN_OTHERWISE]
        keyring = "no keyring is open"
        if not self.keyring.is_sealed:
            keyring = (
                f"{keys} {'key' if keys == 1 else 'keys'} in {self.memory_protection} memory"
                f"{', kept over a restart' if self.keyring.source == KEPT else ''}, loaded {self.keyring.loaded_at}"
            )
        return (
            "; ".join(
                [
                    f"{failure}{self.state}: {keyring}",
                    *conditions,
                    f"{connections} {'connection' if connections == 1 else 'connections'}",
                ]
            )
            + f", {self.counters.requests_total} requests so far"
        )

    def plain_name(self, parameter: Parameter[str], key_id: str) -> str:
        """Return the key ID or alias in any form of KeyId. Raises `InvalidParameter` for an ARN of another agent."""
        if not key_id.startswith("acs:"):
            return key_id
        prefix = self.settings.arn("")
        if not key_id.startswith(prefix):
            raise invalid_parameter(
                parameter.name, f"the ARN is not of this agent: expected {prefix}key/... or {prefix}alias/..."
            )
        kind, _, name = key_id.removeprefix(prefix).partition("/")
        if kind not in ("key", "alias") or not name or (kind == "key" and "/" in name):
            raise invalid_parameter(parameter.name, "the ARN names neither a key nor an alias.")
        return name if kind == "key" else f"alias/{name}"

    def names_of_key(self, key: Key) -> list[str]:
        """Return all names of a key that a grant can contain: its ID, its aliases, and the ARNs of both."""
        return [form for name in (key.key_id, *key.aliases) for form in self.settings.names_of(name)]
