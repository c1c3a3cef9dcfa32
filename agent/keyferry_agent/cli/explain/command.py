"""The arguments and the output of `keyferry-agent explain`."""

import argparse
import grp
import json
import os
import pwd
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from keyferry.arguments import whole_number
from keyferry.stdout import show

from ...authz.grants import ACTIONS
from ...chained_log.chain import ChainError
from ...config.settings import Settings, SettingsError, read
from ...keyring.document import KeyringError
from ...peer import Peer
from ..audit.opening import say
from .judging import WITHOUT_KEY, Decision, Question, decide
from .keys import Keys, find_keys
from .request import find_request, questions_of, recorded_lines
from .suggestion import suggested

__all__ = ["add_parser"]

ALLOWED: Final = 0
REFUSED: Final = 1
_USABLE_IN_ANY_STATE: Final = {"kms:DescribeKey", "kms:ListKeyVersions", *WITHOUT_KEY}
_EPILOG: Final = (
    "exit codes: 0 a grant allows the request, perhaps for the printed recipients or under the printed condition only; 1 no "
    "grant does, the key is missing or unusable, or the configuration or the audit log is invalid (the reason is printed); 2 "
    "wrong usage"
)


def add_parser(commands: Any) -> None:
    """Add `explain` to the agent's command."""
    text = "Print for every grant whether it allows a request, or the first part of the grant that does not match."
    parser = commands.add_parser(
        "explain",
        help="why a caller may do something, or may not",
        description=text,
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--request-id",
        metavar="ID",
        help="the RequestId of a request in the audit log; replaces all options that describe a request",
    )
    parser.add_argument(
        "--audit-log",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="with --request-id: a file of the audit log, or of a journal (default: the configuration's); may be repeated",
    )
    user = parser.add_mutually_exclusive_group()
    user.add_argument("--uid", type=whole_number, metavar="N", help="the caller's user, by its number")
    user.add_argument("--user", metavar="NAME", help="the caller's user, by its name, with its groups on this host")
    parser.add_argument(
        "--access-key", metavar="ID", default="", help="the access key of a gateway's caller; a user is then optional"
    )
    parser.add_argument(
        "--gid", type=whole_number, action="append", default=[], metavar="N", help="a group; may be repeated"
    )
    parser.add_argument("--group", action="append", default=[], metavar="NAME", help="a group, by its name")
    parser.add_argument("--listener", default="default", metavar="NAME", help="the listener it connects to")
    for name in ("unit", "pod", "exe", "sha256"):
        parser.add_argument(f"--{name}", metavar="TEXT", help=f"the caller's {name}, as a grant's `to` has it")
    parser.add_argument("--action", metavar="kms:...", choices=sorted(ACTIONS))
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key ID, alias or ARN; the key's other names come from the keyring, or may be named by repeating it",
    )
    parser.add_argument(
        "--recipient", metavar="FINGERPRINT", help="the fingerprint of the public key that a data key is to go to"
    )
    parser.add_argument("--context", action="append", default=[], metavar="K=V", help="a pair of the EncryptionContext")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=lambda arguments: _explain(arguments, parser.error))


@dataclass
class _Explanation:
    """The content of the output, as text or JSON."""

    decisions: list[Decision]
    keys: list[Keys]
    recorded: list[str] = field(default_factory=list)
    entry: dict[str, Any] | None = None

    @property
    def unusable(self) -> list[str]:
        """Return the reasons for which the agent refuses the request, independently of grants."""
        reasons = [
            f"the keyring has no {keys.missing}, so the agent answers "
            f"Forbidden.{'AliasNotFound' if keys.missing.startswith('alias/') else 'KeyNotFound'}"
            for keys in self.keys
            if keys.missing
        ]
        if not {decision.question.action for decision in self.decisions} <= _USABLE_IN_ANY_STATE:
            reasons += [
                f"the key's state is {keys.state}, so the agent answers Rejected.{keys.state}"
                for keys in self.keys
                if keys.state != "Enabled"
            ]
        return list(dict.fromkeys(reasons))

    @property
    def granted(self) -> bool:
        """Return whether grants allow all parts of the request."""
        return all(decision.allowing for decision in self.decisions)


def _explain(arguments: argparse.Namespace, usage: Callable[[str], None]) -> int:
    if arguments.request_id is None:
        if arguments.uid is None and arguments.user is None and not arguments.access_key:
            usage("--request-id, --uid, --user or --access-key is required")
        if arguments.action is None:
            usage("--action is required")
        if not arguments.key and arguments.action not in WITHOUT_KEY:
            usage("--key is required")
    try:
        settings = read(arguments.config)
        explanation = _of_request(arguments, settings) if arguments.request_id else _of_arguments(arguments, settings)
    except (SettingsError, KeyringError, ChainError, ValueError, TypeError) as error:
        say(str(error))
        return REFUSED
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror))
        return REFUSED
    notes = list(dict.fromkeys(note for keys in explanation.keys for note in keys.notes))
    for note in notes:
        say(note)
    names = {grant.name for grant in settings.grants}
    toml = None
    if not explanation.granted:
        toml = suggested([decision.question for decision in explanation.decisions], names, arguments.user)
    text = _json(explanation, notes, toml, arguments.config) if arguments.json else _text(explanation, toml, settings)
    allowed = explanation.granted and not explanation.unusable
    return show("keyferry-agent", text) or (ALLOWED if allowed else REFUSED)


def _of_request(arguments: argparse.Namespace, settings: Settings) -> _Explanation:
    entry, audit_names = find_request(arguments.request_id, arguments.audit_log, settings)
    questions, keys = questions_of(entry, lambda key_id: find_keys([key_id], settings, audit_names))
    decisions = [decide(settings.grants, question) for question in questions]
    return _Explanation(decisions, keys, recorded_lines(entry), entry)


def _of_arguments(arguments: argparse.Namespace, settings: Settings) -> _Explanation:
    context = dict(_pair(text) for text in arguments.context)
    keys = find_keys(arguments.key, settings) if arguments.key else None
    question = Question(
        peer=_peer(arguments),
        action=arguments.action,
        key=keys.shown if keys else "every key",
        names=keys.names if keys else None,
        fingerprint=arguments.recipient,
        context=context,
    )
    return _Explanation([decide(settings.grants, question)], [keys] if keys else [])


def _peer(arguments: argparse.Namespace) -> Peer:
    """Return the caller that the options describe. Raises ValueError for a name that this host does not have."""
    uid, gids = arguments.uid, set(arguments.gid)
    if arguments.user is not None:
        try:
            user = pwd.getpwnam(arguments.user)
        except KeyError:
            raise ValueError(
                f"--user {arguments.user}: this host has no such user; give its number with --uid"
            ) from None
        uid = user.pw_uid
        user_gids = os.getgrouplist(arguments.user, user.pw_gid)
        gids |= set(user_gids)
        say(f"user {arguments.user} has the uid {uid}, and the groups {', '.join(map(str, sorted(user_gids)))}")
    for name in arguments.group:
        try:
            gids.add(grp.getgrnam(name).gr_gid)
        except KeyError:
            raise ValueError(f"--group {name}: this host has no such group; give its number with --gid") from None
    return Peer(
        uid=uid,
        gids=frozenset(gids),
        pid=None,
        listener=arguments.listener,
        unit=arguments.unit,
        pod=arguments.pod,
        exe=arguments.exe,
        sha256=arguments.sha256,
        access_key=arguments.access_key,
    )


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--context {text}: expected a pair like tenant=acme")
    return key, value


def _text(explanation: _Explanation, toml: str | None, settings: Settings) -> str:
    lines = list(explanation.recorded)
    if lines:
        lines.append("By the current configuration:")
    for decision in explanation.decisions:
        lines += map(str, decision.verdicts)
        if decision.allowing and explanation.unusable:
            lines.append(f"Refused: {'; '.join(explanation.unusable)}")
        else:
            lines.append(str(decision))
    if toml is not None:
        folder = settings.grants_folder
        location = f", in a file in {folder} or in the configuration" if folder and folder.is_dir() else ""
        lines += ["", f"This grant would allow it{location}:", "", toml]
    return "\n".join(lines)


def _json(explanation: _Explanation, notes: list[str], toml: str | None, configuration: Path) -> str:
    return json.dumps(
        {
            "allowed": explanation.granted and not explanation.unusable,
            "request": explanation.entry,
            "decisions": [
                {
                    "action": decision.question.action,
                    "key": decision.question.key,
                    "names": decision.question.names,
                    "allowed": bool(decision.allowing),
                    "recipients": decision.recipients,
                    "grants": [
                        {
                            "grant": verdict.grant,
                            "file": str(verdict.file or configuration),
                            "allows": not verdict.why,
                            "why": verdict.why or None,
                            "recipients": verdict.recipients,
                            "conditions": verdict.conditions,
                        }
                        for verdict in decision.verdicts
                    ],
                }
                for decision in explanation.decisions
            ],
            "unusable": explanation.unusable,
            "needed_grant": toml,
            "notes": notes,
        },
        indent=2,
    )
