"""Passphrases that seal keyrings and module files: checks, generation, and a warning about weak ones.

The functions check a passphrase before a file is sealed with it. The first line of a file of another kind is often public:
"-----BEGIN PRIVATE KEY-----" opens every file that was sealed with the first line of a PEM file. A passphrase that opens a file
is not checked: files of earlier versions must still open with the passphrases that they were sealed with.
"""

import os
import secrets
import unicodedata
from typing import Final

from . import content, new_files

__all__ = [
    "MAX_FILE_BYTES",
    "MIN_CHARACTERS",
    "check",
    "generate",
    "of_file",
    "of_new_file",
    "taken_for",
    "weakness",
    "write_new_file",
]

MAX_FILE_BYTES: Final = 65_536
"""Bytes of a passphrase file to read at most."""
_ONE_LINE: Final = "a passphrase file contains the passphrase alone, on one line"

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


def of_file(data: bytes) -> str:
    """Return the passphrase in the content of a file, to open another file with: its first line. Raises ValueError."""
    try:
        line = data[:MAX_FILE_BYTES].split(b"\n", 1)[0].decode().rstrip("\r")
    except UnicodeDecodeError:
        raise ValueError("not text; a passphrase is expected in the first line") from None
    if not line:
        raise ValueError("the first line is empty; a passphrase is expected there")
    return line


def of_new_file(data: bytes) -> str:
    """Return the passphrase in the content of a file, to seal with: its only line of text.

    Raises ValueError for content that looks like something else, or in which a part of the passphrase would be lost. The
    message shows nothing of the content.
    """
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"longer than {MAX_FILE_BYTES} bytes; {_ONE_LINE}")
    encoding = content.byte_order_mark(data)
    if encoding is not None:
        raise ValueError(f"begins with a byte order mark ({encoding}); save it as UTF-8 without one")
    kind = content.resemblance(data)
    if kind is not None:
        raise ValueError(f"looks like {kind}, which is not a passphrase; {_advice(kind)}")
    if b"\0" in data:
        raise ValueError(f"contains NUL bytes; {_ONE_LINE}")
    passphrase = content.first_line(data, "a passphrase")
    if data.partition(b"\n")[2].strip():
        raise ValueError(f"contains more than one line of text; {_ONE_LINE}")
    check(passphrase)
    return passphrase


def check(passphrase: str) -> None:
    """Raise ValueError for a passphrase that looks like something else, or of which a part is lost easily."""
    if not passphrase:
        raise ValueError("an empty passphrase protects nothing")
    kind = content.resemblance(passphrase.encode(errors="replace"))
    if kind is not None:
        raise ValueError(f"the passphrase looks like {kind}; choose another one, which is secret")
    if passphrase.startswith("#"):
        raise ValueError("the passphrase begins with #, as a comment does; choose another one")
    if passphrase != passphrase.strip():
        raise ValueError("the passphrase begins or ends with white space, which is lost easily; remove the white space")
    if len(passphrase.splitlines()) > 1:
        raise ValueError("the passphrase has more than one line; choose one of a single line")
    if any(character != "\t" and unicodedata.category(character) == "Cc" for character in passphrase):
        raise ValueError("the passphrase contains a control character, which is lost easily; remove the character")
    if "\ufeff" in passphrase:
        raise ValueError("the passphrase contains a byte order mark; remove the mark")


def taken_for(path: str | os.PathLike[str], data: bytes) -> str:
    """Return the addition to a message about a file whose first line did not open a file; empty for a good passphrase file."""
    try:
        of_new_file(data)
    except ValueError as error:
        return f"; the first line of {os.fspath(path)} was taken for the passphrase: {error}"
    return ""


def _advice(resemblance: content.Resemblance) -> str:
    if resemblance.kind in content.SECRETS:
        return f"and its first line may be public; {_ONE_LINE} (a keyring is sealed to an identity by --recipient)"
    if resemblance.kind in (content.RECIPIENT, content.SSH_PUBLIC_KEY):
        return f"and is public; {_ONE_LINE} (a keyring is sealed to a recipient by --recipient)"
    return _ONE_LINE


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
