"""Passphrases that open at once, for tests that are not about scrypt: with the product's work factor each takes a second."""

import shlex
import sys
from typing import Final

import pytest

from keyferry import age_passphrase

WORK_FACTOR: Final = 10
QUICK_CLIENT: Final = (
    sys.executable,
    "-c",
    (
        "import sys; from keyferry import age_passphrase; from keyferry.__main__ import main; "
        f"age_passphrase.WORK_FACTOR = age_passphrase.MIN_STRONG_WORK_FACTOR = {WORK_FACTOR}; sys.exit(main())"
    ),
)
"""`keyferry` in a process of its own that seals with the low work factor, and does not warn of it."""
QUICK_CLIENT_IN_SHELL: Final = shlex.join(QUICK_CLIENT)


def set_low_work_factor(patch: pytest.MonkeyPatch) -> None:
    """Seal with the low work factor in this process, and do not warn of it."""
    patch.setattr(age_passphrase, "WORK_FACTOR", WORK_FACTOR)
    patch.setattr(age_passphrase, "MIN_STRONG_WORK_FACTOR", WORK_FACTOR)
