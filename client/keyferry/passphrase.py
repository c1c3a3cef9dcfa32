"""Passphrases that seal keyrings and module files: their generation, and the warning about weak ones."""

import os
import secrets
from typing import Final

from . import new_files

__all__ = ["MIN_CHARACTERS", "generate", "weakness", "write_new_file"]

MIN_CHARACTERS: Final = 12
"""A shorter passphrase is accepted with a warning: a work factor of 2^18 does not make up for it."""
_ALPHABET: Final = "abcdefghijkmnpqrstuvwxyz23456789"
"""32 characters, so 5 bits each; without l, o, 0 and 1, which people confuse."""
_GROUPS: Final = 7
_GROUP_CHARACTERS: Final = 4


def generate() -> str:
    """Return a new passphrase of 140 bits from the operating system's generator: seven groups of four characters."""
    groups = ("".join(secrets.choice(_ALPHABET) for _ in range(_GROUP_CHARACTERS)) for _ in range(_GROUPS))
    return "-".join(groups)


def weakness(passphrase: str) -> str | None:
    """Return a warning about a short passphrase, and None for any other."""
    if len(passphrase) >= MIN_CHARACTERS:
        return None
    return (
        f"the passphrase has fewer than {MIN_CHARACTERS} characters, so it can be guessed; "
        "--generate-passphrase makes a strong one"
    )


def write_new_file(path: str | os.PathLike[str], passphrase: str) -> None:
    """Write a passphrase to a new file of mode 0600. Raises OSError, also where the file exists."""
    new_files.create(path, f"{passphrase}\n".encode())
