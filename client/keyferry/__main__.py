"""The process of `keyferry`, also as `python -m keyferry`."""

import os
import sys
from collections.abc import Sequence

from . import guard, streams
from .stdout import complain


def main() -> int:
    """Run the command. A command that opens a cryptographic module runs in a process that protects keys."""
    streams.prepare()
    return guard.guarded("keyferry", _run)


def _run() -> int:
    words = [argument for argument in sys.argv[1:] if argument != "--"]
    if _opens_a_module(words):
        from . import hardening  # noqa: PLC0415 - other commands do without

        hardening.clear_freed_memory()
        if words[0] == "module":  # the other commands write files whose mode is the user's choice
            os.umask(0o077)
        for failure in hardening.protect():
            complain("keyferry", f"warning: {failure}")
        hardening.lock_memory()
    from .command import main as command  # noqa: PLC0415 - only now: what is imported before is imported twice

    return command()


def _opens_a_module(words: Sequence[str]) -> bool:
    """Return whether the command makes or opens a cryptographic module."""
    if words[:2] == ["records", "rewrap"]:
        return any(word.split("=")[0] in ("--module", "--pkcs11") for word in words)
    return words[:1] in (["module"], ["encrypt-file"], ["decrypt-file"], ["reencrypt-file"])


if __name__ == "__main__":
    sys.exit(main())
