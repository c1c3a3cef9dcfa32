"""`keyferry-agent explain`: every grant, and the first thing in it that does not match. For operators.

A caller only ever learns `Forbidden.NoPermission`.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from keyferry.arguments import whole_number
from keyferry.operations import OPERATIONS
from keyferry.output import complain, show
from keyferry.parameters import ENCRYPTION_CONTEXT

from .grants import ACTIONS, NEVER_WITH_RECIPIENTS, PLAINTEXT, SELECTORS, Grant
from .peer import Peer
from .settings import SettingsError, read

__all__ = ["add_parser", "mismatch"]

ALLOWED: Final = 0
REFUSED: Final = 1
_WITHOUT_CONTEXT: Final = frozenset(
    each.action
    for each in OPERATIONS.values()
    if not any(name.endswith(ENCRYPTION_CONTEXT.name) for name in each.parameters)
)


def add_parser(commands: Any) -> None:
    """Add `explain` to the agent's command."""
    text = "Say of every grant whether it allows something, or the first thing in it that does not match."
    parser = commands.add_parser(
        "explain",
        help="why somebody may do something, or may not",
        description=text,
        epilog="exit codes: 0 some grant allows it; 1 none does, or the configuration is wrong; 2 usage",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--uid", type=whole_number, required=True, metavar="N", help="the caller's user")
    parser.add_argument(
        "--gid", type=whole_number, action="append", default=[], metavar="N", help="a group; may be repeated"
    )
    parser.add_argument("--listener", default="default", metavar="NAME", help="the listener it connects to")
    for name in ("unit", "pod", "exe", "sha256"):
        parser.add_argument(f"--{name}", metavar="TEXT", help=f"what `to` calls {name}")
    parser.add_argument("--action", required=True, metavar="kms:...", choices=sorted(ACTIONS))
    parser.add_argument(
        "--key",
        required=True,
        action="append",
        metavar="KEY",
        help="a key ID, alias or ARN; to name all that a key is called by, it may be repeated",
    )
    parser.add_argument("--recipient", metavar="PIN", help="the pin of the public key that a data key is to go to")
    parser.add_argument("--context", action="append", default=[], metavar="K=V", help="a pair of the EncryptionContext")
    parser.set_defaults(run=_explain)


def mismatch(
    grant: Grant, peer: Peer, action: str, names: Iterable[str], pin: str | None, context: Mapping[str, str] | None
) -> str | None:
    """The first thing in a grant that does not match; None where it allows."""
    for selector, value in grant.to.items():
        if not SELECTORS[selector](peer, value):
            return f"to.{selector}: the grant is to {value}; the caller's is {_evidence(peer, selector)}"
    if not grant.has_action(action):
        return f"actions: {action} is none of {', '.join(grant.actions)}"
    if not grant.has_key(names):
        return f"keys: {', '.join(names)} matches none of {', '.join(grant.keys)}"
    if not grant.has_recipient(pin):
        never = f"a grant with recipients never covers {action}: the caller would learn or choose a data key"
        return f"recipients: {never if pin == PLAINTEXT else f'{pin} is not in the list'}"
    if not grant.has_context(context):
        wanted = {key: value for key, value in grant.encryption_context.items() if (context or {}).get(key) != value}
        return f"encryption_context: it demands {', '.join(f'{key}={value}' for key, value in wanted.items())}"
    return None


def _evidence(peer: Peer, selector: str) -> str:
    if selector in ("gid", "group"):
        return ", ".join(map(str, sorted(peer.gids))) or "none"
    value = getattr(peer, "uid" if selector == "user" else selector)
    return "not known" if value is None else str(value)


def _explain(arguments: argparse.Namespace) -> int:
    try:
        settings = read(arguments.config)
        context = dict(_pair(text) for text in arguments.context)
    except (SettingsError, ValueError) as error:
        complain("keyferry-agent", str(error))
        return REFUSED
    peer = Peer(
        uid=arguments.uid,
        gids=frozenset(arguments.gid),
        pid=None,
        listener=arguments.listener,
        unit=arguments.unit,
        pod=arguments.pod,
        exe=arguments.exe,
        sha256=arguments.sha256,
    )
    pin = PLAINTEXT if arguments.action in NEVER_WITH_RECIPIENTS else arguments.recipient
    names = _names(arguments.key, f"acs:kms:{settings.region}:{settings.account}:")
    asked = None if arguments.action in _WITHOUT_CONTEXT else context
    found = [(grant, mismatch(grant, peer, arguments.action, names, pin, asked)) for grant in settings.grants]
    allowed = any(why is None for _, why in found)
    lines = [f"{grant.name}: {'allows it' if why is None else why}" for grant, why in found]
    lines += [f"{'Allowed' if allowed else 'Refused'}: {arguments.action} on {', '.join(arguments.key)}"]
    return show("keyferry-agent", "\n".join(lines)) or (ALLOWED if allowed else REFUSED)


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--context {text}: a pair like tenant=acme is expected")
    return key, value


def _names(given: Sequence[str], prefix: str) -> list[str]:
    """What is given, and the same as ARN or without one: as the agent knows a key."""
    names: list[str] = []
    for name in given:
        plain = name.removeprefix(prefix).removeprefix("key/")
        names += [plain, prefix + (plain if plain.startswith("alias/") else f"key/{plain}")]
    return list(dict.fromkeys(names))
