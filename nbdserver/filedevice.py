"""A file or block device as a Device: reads from a shared map, writes through the cache."""

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from nbdserver.allocation import fallocate_zero
from nbdserver.device import (
    STATE_HOLE,
    STATE_ZERO,
    BaseDevice,
    BlockSizes,
    Buffer,
    DeviceError,
    Extent,
)
from nbdserver.writepace import WritePace

_BLKGETSIZE64 = 0x80081272


class FileDevice(BaseDevice):
    """Serves one file of fixed size. Raises OSError when it cannot be opened or mapped.

    Mapped pages are only handed to the kernel; what is looked at here is read with `preadv`.
    """

    can_cache = True
    can_multi_conn = True

    def __init__(self, path: Path, *, read_only: bool = True, description: str = "") -> None:
        self.path = path
        self.read_only = read_only
        self.description = description or path.name
        self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            self.size = _size_of(self._fd)
            self._is_block = stat.S_ISBLK(os.fstat(self._fd).st_mode)
            if self.size == 0:
                raise OSError(errno.EINVAL, "the file is empty", str(path))
            self._map = mmap.mmap(self._fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
        except BaseException:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)
        self._pace = WritePace()
        self._write_flags = os.RWF_NOWAIT
        self.block_sizes = BlockSizes(minimum=512 if self._is_block else 1)
        writable = not read_only
        self.can_flush = self.can_fua = writable
        self.can_trim = self.can_zero = self.can_fast_zero = writable and not self._is_block

    def try_read(self, offset: int, length: int) -> Sequence[Buffer]:
        """A slice of the map. A page that is not resident is read by the kernel while it sends."""
        return (self._view[offset : offset + length],)

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """A slice of the map."""
        return (self._view[offset : offset + length],)

    async def read_copied(self, offset: int, length: int) -> bytes:
        """Read with pread; EIO where the file ends early."""
        return await asyncio.to_thread(self._read_now, offset, length)

    def _read_now(self, offset: int, length: int) -> bytes:
        pieces = []
        while length:
            try:
                piece = os.pread(self._fd, length, offset)
            except OSError as failure:
                raise DeviceError(failure.errno or errno.EIO) from failure
            if not piece:
                raise DeviceError(errno.EIO, f"{self.path} ends before byte {offset + length}")
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)

    def try_write(self, offset: int, payload: Buffer) -> bool:
        """Write into the page cache, unless that would wait."""
        if not self._write_flags and (offset | len(payload)) % mmap.PAGESIZE:
            return False  # The rest of a page may have to be read first.
        if not self._pace.begin(len(payload)):
            return False
        try:
            written = os.pwritev(self._fd, [payload], offset, self._write_flags)
        except BlockingIOError:
            return False
        except OSError as failure:
            if failure.errno == errno.EOPNOTSUPP and self._write_flags:
                # ext4 has no such writes: from here on it is told by how long they take.
                self._write_flags = 0
                return self.try_write(offset, payload)
            raise DeviceError(failure.errno or errno.EIO) from failure
        self._pace.end()
        # Of a short write the rest is written with it again: the same bytes at the same place.
        return written == len(payload)

    async def write(self, offset: int, payload: Buffer, *, fua: bool) -> None:
        """Write; with `fua` it is on the medium when this returns."""
        await asyncio.to_thread(self._write_now, offset, payload, fua)

    def _write_now(self, offset: int, payload: Buffer, fua: bool) -> None:
        view = memoryview(payload)
        try:
            while view:
                written = os.pwrite(self._fd, view, offset)
                view = view[written:]
                offset += written
            if fua:
                os.fdatasync(self._fd)
        except OSError as failure:
            raise DeviceError(failure.errno or errno.EIO) from failure

    async def flush(self) -> None:
        """fdatasync."""
        await asyncio.to_thread(self._sync)

    def _sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as failure:
            raise DeviceError(failure.errno or errno.EIO) from failure

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Punch a hole: what was trimmed reads as zeros (or stays, where there are no holes)."""
        try:
            await asyncio.to_thread(self._zero_now, offset, length, fua, True)
        except DeviceError as failure:
            if failure.errno != errno.EOPNOTSUPP:
                raise

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, no_hole: bool, fast: bool
    ) -> None:
        """Zero by the file system's own means; where it has none, by writing (unless `fast`)."""
        try:
            await asyncio.to_thread(self._zero_now, offset, length, fua, not no_hole)
        except DeviceError as failure:
            if failure.errno != errno.EOPNOTSUPP or fast:
                raise
            await asyncio.to_thread(self._write_zeros_slowly, offset, length, fua)

    def _zero_now(self, offset: int, length: int, fua: bool, punch: bool) -> None:
        try:
            fallocate_zero(self._fd, offset, length, punch=punch)
            if fua:
                os.fdatasync(self._fd)
        except OSError as failure:
            raise DeviceError(failure.errno or errno.EIO) from failure

    def _write_zeros_slowly(self, offset: int, length: int, fua: bool) -> None:
        zeros = bytes(min(length, 1 << 20))
        while length:
            piece = min(length, len(zeros))
            self._write_now(offset, zeros[:piece], False)
            offset += piece
            length -= piece
        if fua:
            self._sync()

    async def cache(self, offset: int, length: int) -> None:
        """Ask the kernel to read ahead."""
        await asyncio.to_thread(os.posix_fadvise, self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    async def extents(
        self,
        context: str,  # noqa: ARG002  # the one context of every device
        offset: int,
        length: int,
        *,
        one: bool,
    ) -> Sequence[Extent]:
        """Data and holes as the file system knows them."""
        if self._is_block:
            return (Extent(length, 0),)
        return await asyncio.to_thread(self._extents_now, offset, length, 1 if one else 4096)

    def _extents_now(self, offset: int, length: int, limit: int) -> list[Extent]:
        extents: list[Extent] = []
        end = offset + length
        while offset < end and len(extents) < limit:
            try:
                data = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError as failure:
                if failure.errno != errno.ENXIO:
                    raise DeviceError(failure.errno or errno.EIO) from failure
                data = end
            if data > offset:
                extents.append(Extent(min(data, end) - offset, STATE_HOLE | STATE_ZERO))
                offset = data
                continue
            hole = os.lseek(self._fd, offset, os.SEEK_HOLE)
            extents.append(Extent(min(hole, end) - offset, 0))
            offset = hole
        return extents

    async def close(self) -> None:
        """Let go of file and map (a slice that is still being sent keeps the map)."""
        if self._fd < 0:
            return
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()
        os.close(self._fd)
        self._fd = -1


def _size_of(fd: int) -> int:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
        return int(struct.unpack("=Q", answer)[0])
    return status.st_size
