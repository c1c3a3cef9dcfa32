"""The process of `keyferry-agent`, also as `python -m keyferry_agent`."""

import os
import sys
from collections.abc import Sequence


def main() -> int:
    """Run the command. A command that opens a keyring runs in a process that protects keys."""
    words = [argument for argument in sys.argv[1:] if argument != "--"]
    if _opens_a_keyring(words):
        from keyferry import hardening  # noqa: PLC0415 - other commands do without

        hardening.clear_freed_memory()
        if words[0] != "run":  # the daemon hardens itself further, and logs what it cannot do
            os.umask(0o077)
            for failure in hardening.protect():
                print(f"keyferry-agent: warning: {failure}", file=sys.stderr)
            hardening.lock_memory()
    from .command import main as command  # noqa: PLC0415 - only now: what is imported before is imported twice

    return command()


def _opens_a_keyring(words: Sequence[str]) -> bool:
    """Return whether the command is the daemon, a verb on a keyring, or a command that looks up aliases."""
    return words[:1] in (["run"], ["keyring"], ["check"]) or words[:2] == ["audit", "who"]


if __name__ == "__main__":
    sys.exit(main())
