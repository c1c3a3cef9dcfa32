"""Programs that read a passphrase from a terminal, as `age` does."""

import os
import pty
from collections.abc import Sequence


def run_with_passphrase(arguments: Sequence[object], passphrase: str, *, prompts: int = 1) -> int:
    """Run a program on a terminal of its own, answer its prompts for a passphrase, and return its exit code."""
    words = [str(argument) for argument in arguments]
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(words[0], words)
    shown = b""
    for number in range(1, prompts + 1):
        while shown.count(b"passphrase") < number:
            shown += os.read(terminal, 1024)
        os.write(terminal, passphrase.encode() + b"\n")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(terminal)
    return code
