"""The lock of a cache directory: one daemon at a time, as a descriptor that can be passed on."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from imagecache.errors import Busy, Denied, Unavailable

LOCK_NAME = "lock"


class DirectoryLock:
    """An flock that lasts as long as any descriptor of its open file, in whatever process.

    `fd` may be handed to a successor (exec or SCM_RIGHTS), which adopts it and never loses it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def take(cls, directory: Path) -> DirectoryLock:
        """The lock of a directory; Busy, with the holder's pid, while somebody has it."""
        path = directory / LOCK_NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            kind = Denied if error.errno in (errno.EACCES, errno.EPERM) else Unavailable
            raise kind(f"lock {path}: {error.strerror}", remedy="remove it") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Unavailable(f"lock {path} is not a regular file", remedy="remove it")
            cls._claim(fd, path)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    @classmethod
    def adopt(cls, fd: int, directory: Path) -> DirectoryLock:
        """The lock that a predecessor passed on; Busy where `fd` is not it."""
        path = directory / LOCK_NAME
        cls._claim(fd, path)
        os.set_inheritable(fd, False)
        return cls(fd)

    @staticmethod
    def _claim(fd: int, path: Path) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise Busy(
                f"cache directory {path.parent} is used by process {pid}",
                remedy="stop that daemon or choose another directory",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock up, unless another process holds a descriptor of it; safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
