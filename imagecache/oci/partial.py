"""The file a blob grows in: `target.partial` until its digest has matched, then `target`.

All methods but the constructor block: they run on a worker thread, one at a time. State: the
open file, its lock (one writer per target, across processes), the running hash, the length.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from imagecache.errors import (
    Busy,
    CubecacheError,
    Denied,
    LimitExceeded,
    NoSpace,
    NotFound,
    Rejected,
    Unavailable,
)
from imagecache.oci.digest import Digest

_READ = 1 << 20


class PartialBlob:
    """A blob on its way to `target`; `length` bytes are written and hashed so far."""

    def __init__(self, target: Path, digest: Digest, size: int) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".partial")
        self.digest = digest
        self.size = size
        self.length = 0
        self._hasher = digest.hasher()
        self._file = -1
        self._lock = threading.Lock()

    def open(self) -> None:
        """Open or make the partial file, lock it, and hash what an earlier run left in it.

        Raises `Busy` when somebody else writes it, `Denied`, `NotFound`, `NoSpace`.
        """
        with self._lock:
            try:
                self._open_locked()
            except OSError as error:
                self._close_locked()
                raise file_error(error, self.path) from None
            except BaseException:
                self._close_locked()
                raise

    def _open_locked(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            self._file = os.open(self.path, flags, 0o600)
            found = os.fstat(self._file)
            if not stat.S_ISREG(found.st_mode):
                raise Denied(f"{self.path} is not a regular file", remedy="remove it")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"{self.path} is being downloaded by somebody else") from None
            # The name may have moved on (renamed, removed) between open and lock.
            try:
                named = self.path.stat(follow_symlinks=False)
            except FileNotFoundError:
                named = None
            if named is not None and (named.st_dev, named.st_ino) == (found.st_dev, found.st_ino):
                break
            os.close(self._file)
            self._file = -1
        if os.fstat(self._file).st_size > self.size:
            os.ftruncate(self._file, 0)
        while piece := os.pread(self._file, _READ, self.length):
            self._hasher.update(piece)
            self.length += len(piece)

    def append(self, pieces: Sequence[bytes]) -> int:
        """Write and hash pieces, in order; returns the new length. Raises `NoSpace` and others."""
        with self._lock:
            try:
                for piece in pieces:
                    rest = memoryview(piece)
                    if self.length + len(rest) > self.size:
                        raise LimitExceeded(f"{self.digest} is longer than its {self.size} bytes")
                    self._hasher.update(rest)
                    while rest:
                        written = os.pwrite(self._file, rest, self.length)
                        self.length += written
                        rest = rest[written:]
            except OSError as error:
                raise file_error(error, self.path) from None
            return self.length

    def restart(self) -> None:
        """Forget all content."""
        with self._lock:
            try:
                os.ftruncate(self._file, 0)
            except OSError as error:
                raise file_error(error, self.path) from None
            self.length = 0
            self._hasher = self.digest.hasher()

    def commit(self) -> bool:
        """Make `target` if size and digest match: fsync, rename, fsync the directory.

        False when they do not match; the partial file then stays.
        """
        with self._lock:
            if self.length != self.size or not self.digest.matches(self._hasher):
                return False
            try:
                os.fsync(self._file)
                self.path.replace(self.target)
                directory = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)
            except OSError as error:
                raise file_error(error, self.target) from None
            self._close_locked()
            return True

    def discard(self) -> None:
        """Remove the partial file and close it."""
        with self._lock:
            if self._file >= 0:
                self.path.unlink(missing_ok=True)
            self._close_locked()

    def close(self) -> None:
        """Close the file; an uncommitted one stays for the next run."""
        with self._lock:
            self._close_locked()

    def _close_locked(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def is_complete(target: Path, digest: Digest, size: int) -> bool:
    """Whether `target` already is a regular file of exactly this content (reads all of it)."""
    try:
        file = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise file_error(error, target) from None
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            return False
        hasher = digest.hasher()
        while piece := os.read(file, _READ):
            hasher.update(piece)
        return digest.matches(hasher)
    finally:
        os.close(file)


def file_error(error: OSError, path: Path) -> CubecacheError:
    """The typed error of a failed file operation."""
    reason = f"{path}: {error.strerror}"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(reason, remedy="free space")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return Denied(reason)
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return NotFound(reason)
    if error.errno in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
        return Rejected(f"{path} is not a regular file")
    return Unavailable(reason)
