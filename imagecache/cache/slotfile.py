"""The arena's file: fixed slots in one sparse file, written by pwrite and read through one map.

Blocking calls only; the arena runs them in its executor. The map is for handing out buffers: Python
reads slots through `read`, because a mapped page whose disk fails is a SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from imagecache.chunks import BLOCK, MAX_CHUNK_BYTES
from imagecache.errors import Denied, Unavailable

SLOT_BYTES = MAX_CHUNK_BYTES
SLOT_SHIFT = SLOT_BYTES.bit_length() - 1
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h
_NO_PUNCH = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class ShortFile(Exception):
    """The file ended inside a slot: somebody truncated it."""


def open_regular(path: Path) -> int:
    """A read-write descriptor of a regular file of our own, made where it is missing.

    What stands there instead (a directory, a link, a FIFO, a file we may not read, or one with
    another name) is moved aside, never followed; raises Denied or Unavailable where that fails.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    for attempt in (0, 1):
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            if attempt or error.errno not in (errno.EISDIR, errno.ELOOP, errno.EACCES, errno.ENXIO):
                kind = Denied if error.errno in (errno.EACCES, errno.EPERM) else Unavailable
                raise kind(f"cache file {path}: {error.strerror}") from error
        else:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                return fd
            os.close(fd)
        set_aside(path)
    raise Unavailable(f"cache file {path} keeps being replaced", remedy="see who writes there")


def set_aside(path: Path) -> Path | None:
    """Renames what is at `path` to the first free `NAME.aside-N`; None where nothing is there."""
    for number in range(1000):
        target = path.with_name(f"{path.name}.aside-{number}")
        if os.path.lexists(target):
            continue
        try:
            path.rename(target)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Denied(f"cache file {path}: {error.strerror}") from error
        return target
    raise Unavailable(f"{path}: too many files set aside", remedy=f"remove {path}.aside-*")


class SlotFile:
    """Slots of `SLOT_BYTES` by number; `view` is the read-only map of all of them."""

    def __init__(self, path: Path, slot_count: int) -> None:
        """Opens or makes the file; Unavailable where the address space or file limit is too low."""
        self.path = path
        self.size = slot_count * SLOT_BYTES
        self.fd = open_regular(path)
        try:
            self.was_bytes = os.fstat(self.fd).st_size
            os.ftruncate(self.fd, self.size)
            self._map = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError, OverflowError) as error:
            os.close(self.fd)
            raise Unavailable(
                f"cannot map {self.size} bytes of {path}: {error}",
                remedy="lower the cache budget, or raise the limit of address space or file size",
            ) from error
        self.view = memoryview(self._map)

    def write(self, slot: int, plaintext: bytes) -> None:
        """Writes a slot from its start; OSError when the disk refuses."""
        at = slot << SLOT_SHIFT
        rest = memoryview(plaintext)
        while rest:
            written = os.pwrite(self.fd, rest, at)
            at += written
            rest = rest[written:]

    def read(self, slot: int, length: int) -> bytes:
        """A private copy of a slot's first bytes; OSError, or ShortFile past a truncated end."""
        at = slot << SLOT_SHIFT
        copy = os.pread(self.fd, length, at)
        while len(copy) < length:
            more = os.pread(self.fd, length - len(copy), at + len(copy))
            if not more:
                raise ShortFile(f"{self.path} ends before slot {slot}")
            copy += more
        return copy

    def read_now(self, slot: int, offset: int, length: int) -> bytearray | None:
        """A private copy of part of a slot if it is in memory; None where that would block.

        Also None for anything odd (a short file, a disk error): the slow way tells which.
        """
        copy = bytearray(length)
        try:
            got = os.preadv(self.fd, (copy,), (slot << SLOT_SHIFT) + offset, os.RWF_NOWAIT)
        except OSError:
            return None
        return copy if got == length else None

    def punch(self, slot: int, from_block: int, blocks: int) -> bool:
        """Gives blocks of a slot back to the file system; False where it cannot do that."""
        return self.punch_range((slot << SLOT_SHIFT) + from_block * BLOCK, blocks * BLOCK)

    def punch_range(self, offset: int, length: int) -> bool:
        """Gives a range of bytes back to the file system; False where it cannot do that."""
        if length <= 0:
            return True
        mode = _KEEP_SIZE | _PUNCH_HOLE
        while _libc.fallocate(self.fd, mode, offset, length):
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number in _NO_PUNCH:
                return False
            raise OSError(number, os.strerror(number), str(self.path))
        return True

    def heal_size(self) -> bool:
        """True, after growing the file again, when somebody had changed its size."""
        if os.fstat(self.fd).st_size == self.size:
            return False
        os.ftruncate(self.fd, self.size)
        return True

    def data_ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, end) of the parts that hold data, in order, as the file system tells."""
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            at = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield start, at

    def disk_bytes(self) -> int:
        """Bytes that the file really occupies."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Ends the descriptor, and the map once nobody holds a buffer of it."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        try:
            self.view.release()
            self._map.close()
        except BufferError:
            # A buffer handed out is still alive somewhere; the map goes with the last of them.
            return
