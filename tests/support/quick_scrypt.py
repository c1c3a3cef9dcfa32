"""Scrypt at almost no cost, for tests that are not about it: at the product's work factor each passphrase takes a second.

Sealed files have the product's work factor in their header all the same. Only a process with the same change opens them.
"""

import shlex
import sys
from typing import Final

import pytest
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from keyferry import age_passphrase

QUICK_SCRYPT: Final = (
    "from keyferry import age_passphrase; scrypt = age_passphrase.Scrypt\n"
    "age_passphrase.Scrypt = lambda salt, length, n, r, p: scrypt(salt, length, 2, r, p)\n"
)
"""Lines of a program that make scrypt quick in its process."""
QUICK_CLIENT: Final = (
    sys.executable,
    "-c",
    f"{QUICK_SCRYPT}import sys; from keyferry.__main__ import main; sys.exit(main())",
)
"""`keyferry` in a process of its own, with scrypt at almost no cost."""
QUICK_CLIENT_IN_SHELL: Final = shlex.join(QUICK_CLIENT)


def make_scrypt_quick(patch: pytest.MonkeyPatch) -> None:
    """Compute scrypt at almost no cost in this process."""
    patch.setattr(age_passphrase, "Scrypt", lambda salt, length, _n, r, p: Scrypt(salt, length, 2, r, p))
