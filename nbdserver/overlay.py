"""A writable copy-on-write device over any device: a sparse data file, and a journal as its map.

An acknowledged write survives the death of the process (data, then map, have reached the kernel
before the answer), a flushed one, or one with FUA, a power loss too. The overlay owns its directory
(files `data` and `journal`, locked while open) and never writes to, or closes, its base.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from nbdserver.allocation import fallocate_zero
from nbdserver.blockmap import (
    FROM_BASE,
    OWN_DATA,
    OWN_ZERO,
    make_data,
    replay,
    write_all,
)
from nbdserver.device import (
    Buffer,
    Device,
    DeviceError,
)
from nbdserver.journal import BLOCK, RECORD_SIZE, Header, Journal, Kind, OverlayError
from nbdserver.overlayreads import OverlayReads
from nbdserver.writepace import QUICK_WRITE, WritePace

__all__ = ["Change", "OverlayDevice", "OverlayError", "OverlayFacts", "list_overlays"]

_COMPACT_RECORDS = 1 << 16


@dataclass(frozen=True)
class OverlayFacts:
    """An overlay without its base: sizes in bytes, of blocks their number."""

    path: Path
    size: int
    base_size: int
    identity: bytes
    data_blocks: int
    zero_blocks: int


@dataclass(frozen=True)
class Change:
    """A changed range: `data` is its bytes, or None where it reads as zeros."""

    offset: int
    length: int
    data: bytes | None


class OverlayDevice(OverlayReads):
    """A copy-on-write device. `create` once, `open` to use, `close` to unlock."""

    read_only = False
    can_flush = can_fua = can_trim = can_zero = can_fast_zero = can_cache = can_multi_conn = True

    def __init__(self, path: Path, base: Device, journal: Journal, *, quota_bytes: int | None):
        super().__init__(path, base, journal)
        self._quota = None if quota_bytes is None else quota_bytes // BLOCK
        self._busy: list[tuple[int, int, asyncio.Future[None]]] = []
        self._pace = WritePace()
        self._compact_at = _COMPACT_RECORDS
        self._suspended = False
        self._sync_lock = asyncio.Lock()

    @classmethod
    def create(cls, path: Path, *, base: Device, identity: bytes, size: int | None = None) -> None:
        """Make an empty overlay directory over `base`, which `identity` names for ever.

        Raises OverlayError (smaller than its base), FileExistsError, OSError.
        """
        size = base.size if size is None else size
        if size < base.size or size == 0:
            raise OverlayError(f"an overlay of {size} bytes over a base of {base.size}")
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_data(path, -(-size // BLOCK) * BLOCK)
        Journal.create(path / "journal", Header(size, base.size, identity))

    @classmethod
    def open(
        cls, path: Path, *, base: Device, identity: bytes, quota_bytes: int | None = None
    ) -> "OverlayDevice":
        """Open and lock. Blocks; OverlayError: another base, in use, damaged."""
        journal = Journal.open(path / "journal")
        try:
            if journal.header.identity != identity:
                raise OverlayError(f"overlay {path} was made on another base")
            if journal.header.base_size != base.size:
                raise OverlayError(
                    f"overlay {path} was made on a base of {journal.header.base_size} bytes, "
                    f"this one has {base.size}"
                )
            return cls(path, base, journal, quota_bytes=quota_bytes)
        except BaseException:
            journal.close()
            raise

    @staticmethod
    def grow(path: Path, size: int) -> None:
        """Make an overlay that is not open larger; what is new reads as zeros. OverlayError."""
        journal = Journal.open(path / "journal")
        try:
            now, _ = replay(journal.header, journal.records)
            if size < now:
                raise OverlayError(f"overlay {path} has {now} bytes and cannot shrink to {size}")
            make_data(path, -(-size // BLOCK) * BLOCK)
            journal.append(Kind.GROW, size, 0)
            journal.append(Kind.MARK, journal.length, 0)
            journal.sync()
        finally:
            journal.close()

    @staticmethod
    def inspect(path: Path) -> OverlayFacts:
        """What an overlay that is not open holds. OverlayError."""
        journal = Journal.open(path / "journal")
        try:
            size, found = replay(journal.header, journal.records)
            header = journal.header
        finally:
            journal.close()
        zeros = found.states.count(OWN_ZERO)
        return OverlayFacts(path, size, header.base_size, header.identity, found.data_blocks, zeros)

    # --- writing ---

    def try_write(self, offset: int, payload: Buffer) -> bool:
        """Write through the page cache, unless the base must be read or the disk is slow now."""
        length = len(payload)
        if self._busy:
            return False
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        states = self._map.states
        if offset % BLOCK and states[first] != OWN_DATA:
            return False
        if (offset + length) % BLOCK and states[last] != OWN_DATA:
            return False
        if not self._pace.begin(length):
            return False
        self._write_now(offset, payload)
        self._pace.end()
        return True

    def _write_now(self, offset: int, payload: Buffer) -> None:
        """Data, then map. Blocks that are not data yet must be covered whole."""
        first = offset // BLOCK
        count = (offset + len(payload) - 1) // BLOCK + 1 - first
        fresh = not self._map.all_are(first, count, OWN_DATA)
        if fresh:
            self._check_quota(first, count)
        try:
            write_all(self._fd, offset, payload)
            if fresh:
                self._journal.append(Kind.DATA, first, count)
        except OSError as failure:
            raise DeviceError(failure.errno or errno.EIO) from failure
        if fresh:
            self._map.set(first, count, OWN_DATA)

    def _check_quota(self, first: int, count: int) -> None:
        if self._quota is None:
            return
        more = count - self._map.states.count(OWN_DATA, first, first + count)
        if self._map.data_blocks + more > self._quota:
            raise DeviceError(errno.ENOSPC, "the overlay's quota is used up")

    async def write(self, offset: int, payload: Buffer, *, fua: bool) -> None:
        """Write; blocks of which only a part is written are completed from the base first."""
        first, last = offset // BLOCK, (offset + len(payload) - 1) // BLOCK
        async with self._claim(first, last):
            start, body = await self._completed(offset, payload)
            if len(body) > QUICK_WRITE or self._pace.slow:
                await self._write_in_thread(start, body)
            else:
                self._write_now(start, body)
        if fua:
            await self.flush()

    async def _write_in_thread(self, offset: int, body: Buffer) -> None:
        first = offset // BLOCK
        count = (offset + len(body) - 1) // BLOCK + 1 - first
        self._check_quota(first, count)
        try:
            await asyncio.to_thread(write_all, self._fd, offset, body)
            # The claim keeps others away from these blocks; the map is the loop's alone.
            if not self._map.all_are(first, count, OWN_DATA):
                self._check_quota(first, count)
                self._journal.append(Kind.DATA, first, count)
                self._map.set(first, count, OWN_DATA)
        except OSError as failure:
            raise DeviceError(failure.errno or errno.EIO) from failure

    async def _completed(self, offset: int, payload: Buffer) -> tuple[int, Buffer]:
        """The payload, with the rest of a first and last block that are not data yet."""
        end = offset + len(payload)
        states = self._map.states
        head = tail = b""
        if offset % BLOCK and states[offset // BLOCK] != OWN_DATA:
            start = offset // BLOCK * BLOCK
            head = await self._block_part(start, offset)
        if end % BLOCK and states[end // BLOCK] != OWN_DATA:
            tail = await self._block_part(end, -(-end // BLOCK) * BLOCK)
        if not (head or tail):
            return offset, payload
        return offset - len(head), b"".join((head, payload, tail))

    async def _block_part(self, start: int, end: int) -> bytes:
        inside = min(end, self.size)
        if start >= inside:
            return bytes(end - start)
        if self._map.states[start // BLOCK] == FROM_BASE and start < self._base_size:
            await self.base.read(start, min(inside, self._base_size) - start)
        return (await self.read_copied(start, inside - start)).ljust(end - start, b"\0")

    @contextlib.asynccontextmanager
    async def _claim(self, first: int, last: int) -> AsyncIterator[None]:
        """Have blocks for oneself: nobody else writes them meanwhile."""
        while True:
            in_the_way = [busy for busy in self._busy if busy[0] <= last and first <= busy[1]]
            if not in_the_way:
                break
            await asyncio.shield(in_the_way[0][2])
        mine = (first, last, asyncio.get_running_loop().create_future())
        self._busy.append(mine)
        try:
            yield
        finally:
            self._busy.remove(mine)
            mine[2].set_result(None)

    # --- zeros ---

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """Whole blocks read as zeros afterwards; parts of blocks stay as they are."""
        first, end = -(-offset // BLOCK), (offset + length) // BLOCK
        if offset + length == self.size:
            end = len(self._map.states)
        if first < end:
            async with self._claim(first, end - 1):
                await self._zero_blocks(first, end - first)
        if fua:
            await self.flush()

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, no_hole: bool, fast: bool
    ) -> None:
        """Whole blocks cost a record, or (`no_hole`) allocated space; parts of blocks a write."""
        end = offset + length
        first = -(-offset // BLOCK)
        last = len(self._map.states) if end == self.size else end // BLOCK
        head = min(first * BLOCK, end) - offset
        tail = max(end - last * BLOCK, 0) if last >= first else 0
        if fast and (head or tail):
            raise DeviceError(errno.EOPNOTSUPP, "parts of blocks are not zeroed faster")
        if head:
            await self.write(offset, bytes(head), fua=False)
        if tail:
            await self.write(end - tail, bytes(tail), fua=False)
        if first < last:
            async with self._claim(first, last - 1):
                if no_hole:
                    await self._allocate_zeros(first, last - first)
                else:
                    await self._zero_blocks(first, last - first)
        if fua:
            await self.flush()

    async def _zero_blocks(self, first: int, count: int) -> None:
        if self._map.all_are(first, count, OWN_ZERO):
            return
        holes = [run for run in self._map.runs(first, count) if run[0] == OWN_DATA]
        try:
            self._journal.append(Kind.ZERO, first, count)
            self._map.set(first, count, OWN_ZERO)
            # Only after the record: a block that is "data" must never lose its data.
            for _state, start, blocks in holes:
                await asyncio.to_thread(
                    fallocate_zero, self._fd, start * BLOCK, blocks * BLOCK, punch=True
                )
        except OSError as failure:
            if failure.errno != errno.EOPNOTSUPP:
                raise DeviceError(failure.errno or errno.EIO) from failure

    async def _allocate_zeros(self, first: int, count: int) -> None:
        self._check_quota(first, count)
        try:
            await asyncio.to_thread(
                fallocate_zero, self._fd, first * BLOCK, count * BLOCK, punch=False
            )
            if not self._map.all_are(first, count, OWN_DATA):
                self._journal.append(Kind.DATA, first, count)
                self._map.set(first, count, OWN_DATA)
        except OSError as failure:
            raise DeviceError(failure.errno or errno.EIO) from failure

    # --- durability ---

    async def flush(self) -> None:
        """Sync data, then the records that it covers."""
        async with self._sync_lock:
            covered = self._journal.length
            try:
                await asyncio.to_thread(os.fdatasync, self._fd)
                # Appending is the loop's alone; only the waiting is done in a thread.
                self._journal.append(Kind.MARK, covered, 0)
                await asyncio.to_thread(self._journal.sync)
                if self._journal.length > self._compact_at * RECORD_SIZE:
                    await self._compact()
            except OSError as failure:
                raise DeviceError(failure.errno or errno.EIO) from failure

    async def _compact(self) -> None:
        """Write the map anew, in as few records as it has runs; writers wait meanwhile."""
        blocks = len(self._map.states)
        async with self._claim(0, blocks - 1):
            records = [
                (int(Kind.DATA if state == OWN_DATA else Kind.ZERO), start, count)
                for state, start, count in self._map.runs(0, blocks)
                if state != FROM_BASE
            ]
            if self.size != self._journal.header.size:
                records.insert(0, (int(Kind.GROW), self.size, 0))
            await asyncio.to_thread(os.fdatasync, self._fd)
            await asyncio.to_thread(self._journal.rewrite, records)
            self._journal.mark_boot()
            self._compact_at = max(_COMPACT_RECORDS, 4 * len(records))

    async def changes(self, *, step: int = 1 << 20) -> AsyncIterator[Change]:
        """All that differs from the base, in order of offset; data in pieces of `step` bytes."""
        for state, first, count in list(self._map.runs(0, len(self._map.states))):
            start, end = first * BLOCK, min((first + count) * BLOCK, self.size)
            if state == OWN_ZERO:
                yield Change(start, end - start, None)
            elif state == OWN_DATA:
                for at in range(start, end, step):
                    size = min(step, end - at)
                    yield Change(at, size, await asyncio.to_thread(self._pread, at, size))

    async def suspend(self) -> None:
        """Unlock for a process that takes over; until `resume` nothing may be asked of it."""
        async with self._sync_lock:
            self._journal.close()
            self._suspended = True

    async def resume(self) -> None:
        """After `suspend`: lock again, and go on from what the disk says. OverlayError."""
        self._journal = await asyncio.to_thread(Journal.open, self.path / "journal")
        self.size, self._map = replay(self._journal.header, self._journal.records)
        self._journal.records = []
        self._suspended = False

    async def close(self) -> None:
        """Let go of the files; what was written stays. The base is not closed."""
        if self._fd < 0:
            return
        async with self._sync_lock:
            with contextlib.suppress(BufferError):
                self._view.release()
                self._mmap.close()
            if not self._suspended:
                self._journal.close()
            os.close(self._fd)
            self._fd = -1


def list_overlays(parent: Path) -> list[Path]:
    """Directories below `parent` that hold an overlay, sorted. Blocks."""
    return sorted(path.parent for path in parent.glob("*/journal"))
