"""The process of `keyferry-agent`, also as `python -m keyferry_agent`."""

import os
import signal
import sys
from collections.abc import Sequence

_INTERRUPTED = 130


def main() -> int:
    """Run the command. A command that opens a keyring runs in a process that protects keys."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:  # the imports below take longer than Python's own start
        signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(_INTERRUPTED))
    from keyferry import guard, streams  # noqa: PLC0415

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.prepare()
    return guard.guarded("keyferry-agent", _run)


def _run() -> int:
    words = [argument for argument in sys.argv[1:] if argument != "--"]
    if _opens_a_keyring(words):
        from keyferry import hardening  # noqa: PLC0415 - other commands do without
        from keyferry.stdout import complain  # noqa: PLC0415

        hardening.clear_freed_memory()
        if words[0] != "run":  # the daemon hardens itself further, and logs the steps that fail
            os.umask(0o077)
            for failure in hardening.protect():
                complain("keyferry-agent", f"warning: {failure}")
            hardening.lock_memory()
    try:
        from .cli.main import main as command  # noqa: PLC0415 - only now: what is imported before is imported twice
    except Exception as error:
        return _not_importable(error)
    return command()


def _not_importable(error: Exception) -> int:
    """Print which OpenSSL configuration prevents the import of the `cryptography` package, and return 1.

    Raises any other import error again.
    """
    from keyferry.openssl_configuration import cryptography_failure  # noqa: PLC0415 - other commands do without

    failure = cryptography_failure(error)
    if failure is None:
        raise error
    print(f"keyferry-agent: {failure}", file=sys.stderr)
    return 1


def _opens_a_keyring(words: Sequence[str]) -> bool:
    """Return whether the command is the daemon, a verb on a keyring, or a command that unseals or looks up aliases."""
    return words[:1] in (["run"], ["keyring"], ["unseal"], ["explain"], ["check"]) or words[:2] == ["audit", "who"]


if __name__ == "__main__":
    sys.exit(main())
