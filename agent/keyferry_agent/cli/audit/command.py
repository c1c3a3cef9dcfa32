"""`keyferry-agent audit ...`: verify the audit log, and list the callers that received data keys."""

import argparse
from pathlib import Path
from typing import Any, Final

from keyferry.stdout import show_lines

from ...audit.history import Chain
from ...chained_log.chain import ChainError
from ...config.settings import Settings, SettingsError, read
from ...keyring.document import KeyringError
from . import times, who
from .opening import open_history, report, say, time_text

__all__ = ["add_parser"]

FAILED: Final = 1
_EPILOG: Final = (
    "exit codes: 0 success, and the audit log is complete (for verify: every chain is whole from its first entry); 1 the "
    "audit log is incomplete, was changed or cannot be read, with the reason on stderr; 2 wrong usage"
)


def add_parser(commands: Any) -> None:
    """Add `audit` and its verbs to the agent's command."""
    parser = commands.add_parser("audit", help="verify and search the audit log", epilog=_EPILOG, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text, handler in (
        ("verify", "Verify the chain of audit entries.", _verify),
        ("who", "List the callers that received data keys, with the master keys and the recipients.", who.who),
    ):
        verb = verbs.add_parser(name, help=text, description=text, epilog=_EPILOG, allow_abbrev=False)
        verb.add_argument(
            "file",
            type=Path,
            nargs="*",
            metavar="FILE",
            help="files of the audit log, or of a journal (journalctl -o cat), in any order; or --config",
        )
        verb.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="the agent's configuration, which names the audit log; rotated files beside it are read, too",
        )
        verb.set_defaults(run=_guarded, verb_action=handler)
        verb.add_argument(
            "--since",
            type=times.since,
            metavar="TIME",
            help=f"{times.EXPECTED}. The audit log may be incomplete before this time",
        )
        if name == "who":
            who.add_options(verb)


def _guarded(arguments: argparse.Namespace) -> int:
    try:
        settings = read(arguments.config) if arguments.config else None
        code: int = arguments.verb_action(arguments, settings)
    except (ChainError, KeyringError, SettingsError, OSError) as error:
        say(str(error))
    except (KeyError, TypeError, ValueError) as error:  # an entry whose fields are not those of the agent
        say(f"not a line of an audit log: {error!r}")
    else:
        return code
    return FAILED


def _verify(arguments: argparse.Namespace, settings: Settings | None) -> int:
    history = open_history(arguments.file, settings, None)
    report(history, arguments.since)
    # Old files are usually deleted, so a chain that is whole from its first entry is not damaged. --since requires more.
    is_whole = history.only_older_missing and arguments.since is None
    is_whole = is_whole or history.is_complete(arguments.since)
    lines = []
    if len(history.chains) > 1 and any(chain.start is not None for chain in history.chains):
        lines = [f"chain {number}: {_line(chain)}" for number, chain in enumerate(history.chains, 1)]
    if is_whole:
        period = f"from {time_text(history.healed)} on" if history.problems else "from the beginning"
        chains = f" in {len(lines)} chains" if lines else ""
        lines.append(f"whole: {history.count} lines{chains}, {period}; the last has the SHA-256 {history.last}")
    return show_lines("keyferry-agent", lines) or (0 if is_whole else FAILED)


def _line(chain: Chain) -> str:
    start = chain.start
    beginning = f"from {time_text(chain.begins)}"
    if start is not None:
        beginning = (
            f"from the start of agent {start.get('version')}, pid {start.get('pid')}, at {time_text(chain.begins)}"
        )
    return (
        f"{'whole' if chain.whole else 'NOT WHOLE'}: {chain.count} lines, {beginning} to {time_text(chain.ends)}; "
        f"the last has the SHA-256 {chain.last}"
    )
