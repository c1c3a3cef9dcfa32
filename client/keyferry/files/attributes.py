"""Attributes of a file besides its content: mode, owner, group and times.

Access control lists and extended attributes are not kept.
"""

import os
import stat
from contextlib import suppress
from typing import Final, NamedTuple, Self

__all__ = ["Attributes"]

_PERMISSIONS: Final = 0o777
_ALL_BITS: Final = 0o7777


class Attributes(NamedTuple):
    """Mode, owner and group of a file, and its times if these are kept too."""

    mode: int
    uid: int
    gid: int
    times: tuple[int, int] | None
    """Times of the last access and the last change of the content, in nanoseconds; None: do not set them."""

    @classmethod
    def of_original(cls, status: os.stat_result) -> Self:
        """Return the attributes that `--preserve` keeps of the file that is read."""
        times = status.st_atime_ns, status.st_mtime_ns
        return cls(status.st_mode & _ALL_BITS, status.st_uid, status.st_gid, times)

    @classmethod
    def of_replaced(cls, status: os.stat_result) -> Self:
        """Return the attributes to keep of a file that is replaced: without times, set-uid, set-gid and sticky bits."""
        return cls(status.st_mode & _PERMISSIONS, status.st_uid, status.st_gid, None)

    def apply(self, descriptor: int) -> None:
        """Set the attributes of an open file, as far as the system permits.

        Where the owner or the group cannot be set, the function drops the mode bits that would apply to another owner or group.
        """
        mode = self.mode
        if not _set_owner(descriptor, self.uid, -1):
            mode &= ~stat.S_ISUID
        if not _set_owner(descriptor, -1, self.gid):
            mode &= ~(stat.S_ISGID | stat.S_IRWXG)
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            with suppress(PermissionError):  # a file system that has one mode for all files
                os.fchmod(descriptor, mode)
        if self.times is not None:
            os.utime(descriptor, ns=self.times)


def _set_owner(descriptor: int, uid: int, gid: int) -> bool:
    status = os.fstat(descriptor)
    if uid in (-1, status.st_uid) and gid in (-1, status.st_gid):
        return True
    try:
        os.fchown(descriptor, uid, gid)
    except OSError:
        return False
    return True
