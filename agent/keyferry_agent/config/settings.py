"""Read the configuration: TOML in, frozen settings or all problems out.

Every limit has a default that suits a small host, and its reason next to it. An unknown key is an error, because a misspelt
`recipients` must never mean "any".
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

from keyferry.protocol.rpc import DEFAULT_SOCKET
from keyferry.secret import Backing

from ..authz.grants import SELECTORS, Grant
from . import gateways, grant_checks, grant_files, validators
from .gateways import Gateway
from .table import ConfigTable, load

__all__ = [
    "DEFAULT_UNSEAL_SOCKET",
    "Audit",
    "Limits",
    "Listener",
    "Settings",
    "SettingsError",
    "examine",
    "look_up",
    "read",
]


MANUAL: Final = "manual"
"""The value of `unseal` if an operator sends the secret to the running agent."""
DEFAULT_UNSEAL_SOCKET: Final = Path("/run/keyferry-agent/unseal.sock")


class SettingsError(Exception):
    """The configuration is invalid. `problems` has one line for each problem."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket to serve. Grants refer to it by `name`. `uid` and `gid` are for its file; None leaves them unchanged."""

    name: str = "default"
    path: Path = Path(DEFAULT_SOCKET)
    mode: int = 0o660
    uid: int | None = None
    gid: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the agent, and of each user."""

    connections: int = 1_024
    """Limit of open connections. An idle one costs a few KiB and a descriptor."""
    connections_per_user: int = 256
    """Limit of open connections of one user: with the defaults, no fewer than four users can occupy all connections."""
    request_timeout: float = 10.0
    """Seconds for receiving one complete request, and for sending its answer. A local process needs milliseconds."""
    requests_per_second: int = 0
    """Limit for each user and each access key; 0 disables it."""
    gateway_connections: int = 256
    """Limit of open connections of all gateways together. At most half of them may be without a verified signature."""
    gateway_clock_skew: int = 900
    """Seconds by which the clock of a gateway's client may differ, as in the cloud."""
    gateway_nonces: int = 65_536
    """Nonces to remember for each access key: some 5 MiB."""


@dataclass(frozen=True, slots=True)
class Audit:
    """Settings of the audit log. `path`: "stderr", or a file to append to. `on_failure`: whether the agent refuses or serves a
    request whose audit entry cannot be written.
    """

    path: str = "stderr"
    on_failure: Literal["refuse", "serve"] = "refuse"


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of the agent. docs/configuration.md explains them."""

    listeners: tuple[Listener, ...] = (Listener(),)
    gateways: tuple[Gateway, ...] = ()
    keyring: Path | None = None
    unseal: Path | None = None
    unseal_socket: Path | None = None
    """The socket on which operators send the unseal secret, with `unseal = "manual"`; None if it is read from a file."""
    region: str = "local"
    account: str = "0"
    memory: Literal["require", "prefer"] = "require"
    memory_backing: Backing = "auto"
    sm2_fallback: Literal["none", "gmssl"] = "none"
    keep_keys: bool = False
    """Store the keyring's memory with the service manager, so that a restart does not need the unseal secret."""
    development_aliases: Mapping[str, str] | None = None
    """Further aliases of the keyring that `--dev` generates, and their key specs; None without `--dev`."""
    development_access_key: str = ""
    """The ID of the access key that `--dev` generates for the gateway of `--gateway`; empty without it."""
    metrics: str = ""
    """The address of metrics: the path of a socket, or ADDRESS:PORT. If it is empty, metrics are not served."""
    limits: Limits = Limits()
    audit: Audit = Audit()
    grants: tuple[Grant, ...] = ()
    grants_folder: Path | None = field(default=None, compare=False)
    """The folder of files of grants, one for each application. The default folder need not exist."""
    names: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """The numbers of users and groups that grants name, by selector ("user" or "group") and name; -1 if a name is not found."""
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def arn(self, resource: str) -> str:
        """Return the ARN of `key/ID` or `alias/NAME`."""
        return f"acs:kms:{self.region}:{self.account}:{resource}"

    def names_of(self, name: str) -> tuple[str, str]:
        """Return the names by which a grant can refer to a key with this ID or alias: the name, and its ARN."""
        return name, self.arn(name if name.startswith("alias/") else f"key/{name}")


class Examined(NamedTuple):
    """The result of examining a configuration: its settings, if it could be parsed, and its problems, one message each."""

    settings: Settings | None
    problems: list[str]
    open_to_others: list[str]
    """Ways in which other users can write to one of the files."""
    missing: list[str]
    """Files that this host does not have, although the host that the configuration is for may have them."""


def read(path: Path) -> Settings:
    """Return the settings of a configuration file. Raises `SettingsError` with all problems."""
    settings, *problems = examine(path)
    if settings is None or any(problems):
        raise SettingsError([problem for kind in problems for problem in kind])
    return settings


def examine(path: Path) -> Examined:
    """Return the settings of a configuration file, and all problems of its files and of their content."""
    content_of_file = load(path)
    if content_of_file.raw is None:
        return Examined(None, [f"{path}: {content_of_file.problem}"], content_of_file.open_to_others, [])
    table = ConfigTable("", content_of_file.raw, [], [])
    setting = table.get("grants_folder", "the path of a folder", validators.path, None)
    folder = grant_files.beside(path) if setting is None else setting
    files = grant_files.read(folder)
    settings = _settings(table, files)
    sources = [(path, table), *((file.path, file.table) for file in files)]
    problems = [f"{source}: {problem}" for source, content in sources for problem in content.problems]
    names = {listener.name for listener in settings.listeners} | {gateway.name for gateway in settings.gateways}
    warnings = [f"{file.path}: {warning}" for file in files for warning in file.table.warnings]
    warnings = [*table.warnings, *warnings, *grant_checks.warnings(settings.grants)]
    return Examined(
        replace(settings, grants_folder=folder, warnings=tuple(warnings)),
        [*problems, *grant_checks.problems(settings.grants, path, names, settings.arn(""))],
        [*content_of_file.open_to_others, *(problem for file in files for problem in file.open_to_others)],
        [f"grants_folder: {folder} does not exist"] if setting is not None and not os.path.lexists(setting) else [],
    )


_LISTENER: Final = Listener()
_LIMITS: Final = Limits()
_AUDIT: Final = Audit()


# --- the tables -------------------------------------------------------------------------------------------------------


def _settings(table: ConfigTable, files: Sequence[grant_files.File]) -> Settings:
    only_listener = _listener(table, "socket")
    listeners = tuple(_named_listener(entry) for entry in table.tables("listener"))
    for name in ("socket", "mode"):
        if listeners and table.has(name):
            table.add_problem(name, "either socket and mode, or [[listener]] tables; not both")
    for attribute in ("name", "path"):
        values = [getattr(listener, attribute) for listener in listeners]
        if len(set(values)) != len(values):
            table.add_problem("listener", f"two listeners have the same {attribute}")
    names: dict[tuple[str, str], int] = {}
    manual = table.has("unseal") and table.get("unseal", "", lambda value: value, None) == MANUAL
    unseal_socket = table.get("unseal_socket", "the path of a socket", validators.socket_path, DEFAULT_UNSEAL_SOCKET)
    if table.has("unseal_socket") and not manual:
        table.add_problem("unseal_socket", 'has no effect without unseal = "manual"')
    limits, audit, metrics = table.table("limits"), table.table("audit"), table.table("metrics")
    settings = Settings(
        listeners=listeners or (only_listener,),
        gateways=tuple(gateways.gateway_of(entry) for entry in table.tables("gateway")),
        keyring=table.get("keyring", "the path of a keyring file", validators.path, None),
        unseal=None
        if manual
        else table.get("unseal", "the path of an identity or passphrase file", validators.unseal, None),
        unseal_socket=unseal_socket if manual else None,
        region=table.get("region", "letters, digits, _ and -", validators.arn_part, "local"),
        account=table.get("account", "letters, digits, _ and -", validators.arn_part, "0"),
        memory=table.get("memory", "", validators.one_of("require", "prefer"), "require"),
        memory_backing=table.get("memory_backing", "", validators.one_of("auto", "memfd_secret", "mlock"), "auto"),
        sm2_fallback=table.get("sm2_fallback", "", validators.one_of("none", "gmssl"), "none"),
        keep_keys=table.get("keep_keys", "true or false", validators.boolean, False),
        metrics=_metrics(metrics),
        limits=_limits(limits),
        audit=Audit(
            path=audit.get("path", 'an absolute path, or "stderr"', _audit_path, _AUDIT.path),
            on_failure=audit.get("on_failure", "", validators.one_of("refuse", "serve"), _AUDIT.on_failure),
        ),
        grants=(
            *(_grant(entry, names, None) for entry in table.tables("grant")),
            *(_grant(entry, names, file.path) for file in files for entry in file.table.tables("grant")),
        ),
        names=names,
    )
    audit.check_unknown()
    table.check_unknown()
    paths = {str(listener.path) for listener in settings.listeners}
    if settings.metrics in paths:
        table.add_problem("metrics.listen", f"a listener has the path {settings.metrics}; name another one")
    if str(settings.unseal_socket) in paths | {settings.metrics}:
        table.add_problem("unseal_socket", f"another socket has the path {settings.unseal_socket}; name another one")
    sockets = [*paths, settings.metrics, str(settings.unseal_socket)]
    for name, why in gateways.problems(settings.gateways, [entry.name for entry in settings.listeners], sockets):
        table.add_problem(name, why)
    return settings


def _audit_path(value: Any) -> str:
    path = validators.string(value)
    if path != "stderr" and (not path.startswith("/") or "\0" in path):
        raise ValueError
    return path if path == "stderr" else str(validators.path(path))


def _metrics(table: ConfigTable) -> str:
    """Return the address of metrics. An address that other hosts can reach needs `remote = true`."""
    remote = table.get("remote", "true or false", validators.boolean, False)
    check = validators.remote_address if remote else validators.address
    address: str = table.get("listen", 'an absolute path, or an address like "127.0.0.1:9464"', check, "")
    if remote and not table.has("listen"):
        table.add_problem("remote", "has no effect without listen")
    table.check_unknown()
    return address


def _limits(table: ConfigTable) -> Limits:
    limits = Limits(
        connections=table.get("connections", "an integer from 1", validators.at_least(1), _LIMITS.connections),
        connections_per_user=table.get(
            "connections_per_user", "an integer from 1", validators.at_least(1), _LIMITS.connections_per_user
        ),
        request_timeout=table.get(
            "request_timeout", "seconds, above 0 to 3600", validators.seconds, _LIMITS.request_timeout
        ),
        requests_per_second=table.get(
            "requests_per_second", "an integer from 0", validators.at_least(0), _LIMITS.requests_per_second
        ),
        gateway_connections=table.get(
            "gateway_connections", "an integer from 2", validators.at_least(2), _LIMITS.gateway_connections
        ),
        gateway_clock_skew=table.get(
            "gateway_clock_skew", "seconds, 1 to 900", validators.between(1, 900), _LIMITS.gateway_clock_skew
        ),
        gateway_nonces=table.get("gateway_nonces", "an integer from 1", validators.at_least(1), _LIMITS.gateway_nonces),
    )
    table.check_unknown()
    return limits


def _listener(table: ConfigTable, path: str) -> Listener:
    return Listener(
        path=table.get(path, "the path of a socket", validators.socket_path, _LISTENER.path),
        mode=table.get("mode", 'an octal mode as text, like "0660"', validators.mode, _LISTENER.mode),
    )


def _named_listener(table: ConfigTable) -> Listener:
    listener = _listener(table, "path")
    if not table.has("path"):
        table.add_problem("path", "missing")
    named_listener = Listener(
        name=table.get("name", "a name", validators.string, ""),
        path=listener.path,
        mode=listener.mode,
        uid=table.get("user", "a user of this host, by name or number", validators.uid, None),
        gid=table.get("group", "a group of this host, by name or number", validators.gid, None),
    )
    if not table.has("name"):
        table.add_problem("name", "missing")
    table.check_unknown()
    return named_listener


def _grant(table: ConfigTable, names: dict[tuple[str, str], int], file: Path | None) -> Grant:
    name = table.get("name", "a name", validators.string, "")
    for required_name in ("name", "to", "actions", "keys"):
        if not table.has(required_name):
            table.add_problem(required_name, "missing")
    to = table.table("to")
    if table.has("to") and to.is_empty:
        table.add_problem("to", "empty; name the caller that the grant is to, for example uid = 1000")
    grant = Grant(
        name=name,
        to=_to(to, names),
        actions=table.get("actions", 'a list of actions like "kms:Decrypt"', validators.actions, ()),
        keys=table.get(
            "keys",
            'a list of keys like "alias/orders-*"',
            validators.list_of(validators.KEY, "key ID, alias or ARN"),
            (),
        ),
        recipients=table.get(
            "recipients",
            "a list of fingerprints",
            lambda value: frozenset(
                validators.list_of(validators.FINGERPRINT, "fingerprint (keyferry-agent fingerprint FILE prints one)")(
                    value
                )
            ),
            None,
        ),
        encryption_context=table.get(
            "encryption_context", "a table of strings", validators.pairs, MappingProxyType({})
        ),
        file=file,
    )
    table.check_unknown()
    return grant


_LOOKUPS: Final[Mapping[str, Callable[[Any], int]]] = {"user": validators.uid, "group": validators.gid}
_NO_ID: Final = -1


def _number_of(selector: str, name: str) -> int:
    """Return the number of a user or group in the system's databases, or -1 if it is not found. May block."""
    try:
        return _LOOKUPS[selector](name)
    except (KeyError, ValueError):  # ValueError: not a possible name; it has a NUL
        return _NO_ID


def look_up(names: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], int]:
    """Return the numbers that users and groups have now. May block: a directory service may be far away."""
    return {(selector, name): _number_of(selector, name) for selector, name in names}


def _to(table: ConfigTable, names: dict[tuple[str, str], int]) -> Mapping[str, Any]:
    checks: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "uid": ("a number, 0 to 4294967294", validators.identity),
        "gid": ("a number, 0 to 4294967294", validators.identity),
        "user": ("the name of a user", validators.string),
        "group": ("the name of a group", validators.string),
        "listener": ("the name of a listener", validators.string),
        "unit": ("the name of a systemd unit, like orders.service", validators.matching(validators.UNIT)),
        "pod": ("the UID of a Kubernetes pod", validators.matching(validators.POD)),
        "exe": ("the absolute path of a program", lambda value: str(validators.path(value))),
        "sha256": ('"sha256:" and the hash of a program, in hex', validators.matching(validators.FINGERPRINT)),
        "access_key": ("the ID of an access key, like LTAI...", validators.matching(validators.ACCESS_KEY_ID)),
    }
    to: dict[str, Any] = {}
    for selector in SELECTORS:
        requirement, check = checks[selector]
        value = table.get(selector, requirement, check, None)
        if table.has(selector):
            to[selector] = value
    for selector in _LOOKUPS:
        name = to.get(selector)
        if isinstance(name, str):
            # A missing user or group is not an error, because several hosts may share a file. The grant matches no caller then.
            to[selector] = names[selector, name] = _number_of(selector, name)
            if to[selector] == _NO_ID:
                table.add_warning(selector, f"this host has no {selector} {name!r}; the grant matches no caller")
    table.check_unknown()
    return MappingProxyType(to)
