"""The arena: verified chunks in one mapped file, within a byte budget, across restarts."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from imagecache.cache.index import SlotIndex
from imagecache.cache.indexqueue import IndexQueue
from imagecache.cache.lease import Lease
from imagecache.cache.lock import DirectoryLock
from imagecache.cache.passing import Passing
from imagecache.cache.settings import ArenaSettings, ArenaStats, Integrity
from imagecache.cache.slotfile import SLOT_BYTES, ShortFile, SlotFile
from imagecache.cache.slots import SlotTable
from imagecache.cache.upkeep import start_upkeep
from imagecache.cache.writing import SUM_BYTES, Work, Written, block_sums, write_all
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.errors import Denied, NoSpace, Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

_TICK_SECONDS = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MEDIUM = (errno.EIO, errno.EUCLEAN, errno.ENODATA)


class Arena(Passing):
    """Chunks by digest. All methods belong to the loop that opened it."""

    def __init__(
        self, lock: DirectoryLock | None, file: SlotFile, index: SlotIndex, settings: ArenaSettings
    ) -> None:
        """Use `open` or `look`."""
        super().__init__(lock, IndexQueue(index, settings.retry_seconds))
        self.settings = settings
        self.file = file
        self.view = file.view
        self.table = SlotTable(settings.slot_count, settings.budget_bytes // BLOCK)
        self._io = ThreadPoolExecutor(settings.workers, thread_name_prefix="arena-io")
        self._sums: dict[int, bytes] | None = (
            {} if settings.integrity is Integrity.EVERY_READ else None
        )
        self._degraded: str | None = None
        self._retry_at = 0.0
        self._closed = False
        self._admitted_bytes = 0
        self.admitted = self.refused = self.checked = self.quarantined = 0

    # --- life

    @classmethod
    async def open(
        cls, directory: Path, settings: ArenaSettings | None = None, *, lock_fd: int | None = None
    ) -> Arena:
        """The arena of a directory, made where there is none.

        `lock_fd` is the descriptor of a predecessor that passes its lock on. Raises Busy (another
        daemon, by pid), Unsupported (an index of a newer version), Denied, NoSpace or Unavailable.
        """
        settings = settings or ArenaSettings()
        loop = asyncio.get_running_loop()
        arena = await loop.run_in_executor(None, cls._opened, directory, settings, lock_fd)
        arena._start(*arena._upkeep())
        return arena

    @classmethod
    async def look(cls, directory: Path, settings: ArenaSettings) -> Arena:
        """The arena as a frozen predecessor left it; frozen itself until `claim`."""
        arena = await asyncio.to_thread(cls._opened, directory, settings, None, True)
        arena._open.clear()
        return arena

    @classmethod
    def _opened(
        cls, directory: Path, settings: ArenaSettings, lock_fd: int | None, looking: bool = False
    ) -> Arena:
        lock: DirectoryLock | None = None
        file: SlotFile | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if lock_fd is not None:
                lock = DirectoryLock.adopt(lock_fd, directory)
            elif not looking:
                lock = DirectoryLock.take(directory)
            file = SlotFile(directory / "slots", settings.slot_count)
            index = SlotIndex(directory / "index.db")
            arena = cls(lock, file, index, settings)
            arena._load(index)
            if not looking:
                arena._tidy()
        except BaseException as error:
            if file is not None:
                file.close()
            if lock is not None and lock_fd is None:
                lock.release()
            if isinstance(error, OSError):
                raise _refusal(directory, error) from error
            raise
        return arena

    def _load(self, index: SlotIndex) -> None:
        table = self.table
        table.restore(index.rows())
        if index.lost:
            for start, end in self.file.data_ranges():
                for slot in range(start // SLOT_BYTES, -(-end // SLOT_BYTES)):
                    low = max(start, slot * SLOT_BYTES)
                    high = min(end, (slot + 1) * SLOT_BYTES)
                    # Data need not start at the slot's start after a crash; its end counts.
                    table.restore_unknown(
                        slot, -(-(high - slot * SLOT_BYTES) // BLOCK) if high > low else 0
                    )
            for slot in table.present_slots():
                self.note_recovered(slot)

    def _tidy(self) -> None:
        table, end = self.table, self.file.size
        table.can_punch = self.file.punch_range(end - BLOCK, BLOCK)
        for first, last in table.restored():
            self.file.punch_range(first * SLOT_BYTES, (last - first) * SLOT_BYTES)
        self._note_evictions()

    def _upkeep(self) -> list[Coroutine[Any, Any, None]]:
        return [self._index.run(), self._keep_ticking(), *start_upkeep(self)]

    async def close(self) -> None:
        """Ends upkeep, writes the index down, and gives the lock up; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        await self._end_tasks()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._io.shutdown)
        await self._index.close()
        self.file.close()
        if self._lock is not None:
            self._lock.release()

    # --- looking up

    def holds(self, digest: bytes) -> bool:
        """Whether a chunk is here, compared with its digest already or not."""
        return self.table.find(digest) >= 0

    @property
    def degraded(self) -> str | None:
        """Why the disk is not written at the moment; None while all is well."""
        return self._degraded

    def stats(self) -> ArenaStats:
        """The counts of this moment."""
        table = self.table
        return ArenaStats(
            chunks=len(table),
            used_bytes=table.used_blocks * BLOCK,
            budget_bytes=self.settings.budget_bytes,
            unchecked=table.unchecked,
            pinned=table.pinned,
            leased=table.leased,
            admitted=self.admitted,
            refused=self.refused,
            evicted=table.evictions,
            wasted_ahead=table.wasted,
            checked=self.checked,
            quarantined=self.quarantined,
            degraded=self._degraded,
        )

    def lease(
        self, digests: Iterable[bytes], seconds: float | None = None, *, weight: int = 0
    ) -> Lease:
        """Keeps content from eviction, whether it is here yet or not, until released or run out.

        `weight` is the bytes that it takes here; `leased_bytes` sums what is held in this way.
        """
        lease = Lease(self.table, frozenset(digests), weight)
        if seconds is not None:
            lease.ends_in(seconds)
        return lease

    @property
    def leased_bytes(self) -> int:
        """What all leases together weigh."""
        return self.table.leased_bytes

    @property
    def is_full(self) -> bool:
        """Whether the next large chunk would push another one out."""
        return (self.table.used_blocks * BLOCK) + SLOT_BYTES > self.settings.budget_bytes

    # --- reading

    async def copy(self, digest: bytes) -> bytes | None:
        """A private copy of a chunk, compared with its digest; None where it is not here now.

        What does not match, or cannot be read, is quarantined: the caller fetches it again.
        """
        table = self.table
        slot = table.find(digest)
        if slot < 0:
            return None
        table.pin(slot)
        try:
            return await self._read_checked(slot, digest)
        finally:
            table.unpin(slot)

    async def _read_checked(self, slot: int, digest: bytes) -> bytes | None:
        length = self.table.blocks[slot] * BLOCK

        def job() -> tuple[bytes, bool, bytes | None]:
            copy = self.file.read(slot, length)
            right = chunk_digest(copy) == digest
            return copy, right, block_sums(copy) if self._sums is not None else None

        try:
            copy, right, sums = await self._run(job)
        except ShortFile:
            self._tampered()
            self._quarantine(slot, digest, "the file was truncated")
            return None
        except OSError as error:
            self._quarantine(slot, digest, str(error), lost=error.errno in _MEDIUM)
            return None
        self.checked += 1
        if not right:
            self._quarantine(slot, digest, "its bytes do not match its digest")
            return None
        if self.table.find(digest) == slot:
            self.table.trust(slot)
            if self._sums is not None and sums is not None:
                self._sums[slot] = sums
        return copy

    def peek(self, slot: int, offset: int, length: int) -> memoryview | None:
        """A private copy of part of a checked slot, compared with its blocks' sums, on the loop.

        None where that would block, or after the chunk was quarantined: then `copy` knows more.
        For the policy `every-read`.
        """
        sums = self._sums.get(slot) if self._sums is not None else None
        if sums is None:
            return None
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        copy = self.file.read_now(slot, first * BLOCK, (end - first) * BLOCK)
        if copy is None:
            return None
        view = memoryview(copy)
        if block_sums(view) != sums[first * SUM_BYTES : end * SUM_BYTES]:
            digest = self.table.digests[slot]
            if digest is not None:
                self._quarantine(slot, digest, "a block does not match its sum")
            return None
        start = offset - first * BLOCK
        return view[start : start + length]

    # --- writing

    async def admit(self, chunks: Sequence[tuple[bytes, bytes]], *, ahead: bool) -> int:
        """Keeps verified (digest, plaintext) pairs; how many distinct ones are here afterwards.

        `ahead`: fetched before anybody asked. Never raises for a disk that refuses: the chunks are
        passed through, `degraded` says why, and a write is tried again later.
        """
        await self._open.wait()
        if self._degraded and asyncio.get_running_loop().time() < self._retry_at:
            self.refused += len(chunks)
            return 0
        table = self.table
        work: list[Work] = []
        present = 0
        for digest, plaintext in dict(chunks).items():
            if table.find(digest) >= 0:
                present += 1
                continue
            reservation = table.reserve(len(plaintext) // BLOCK)
            if reservation is None:
                self.refused += 1
                continue
            work.append(Work(reservation, digest, plaintext))
        self._note_evictions()
        if not work:
            return present
        punch, sums = table.can_punch, self._sums is not None
        self._begun()
        job = self._run(lambda: write_all(self.file, work, can_punch=punch, with_sums=sums))
        try:
            await asyncio.shield(job)
        except asyncio.CancelledError:
            # The thread goes on; its slots must not be given to anybody before it is done.
            job.add_done_callback(lambda done: self._settle(work, done.result(), ahead))
            raise
        return present + self._settle(work, job.result(), ahead)

    def _settle(self, work: Sequence[Work], written: Sequence[Written], ahead: bool) -> int:
        self._ended()
        table, kept, twice = self.table, 0, 0  # twice: another caller was first
        for item, outcome in zip(work, written, strict=True):
            reservation, digest = item.reservation, item.digest
            for number, slot in enumerate(reservation.punches):
                done = number < len(outcome.punched) and outcome.punched[number]
                table.punched(slot, given_back=done)
            if False in outcome.punched:
                table.can_punch = False
            if outcome.healed:
                self._tampered()
            if outcome.error is not None or table.find(digest) >= 0:
                table.abandon(reservation, written=outcome.error is None)
                twice += outcome.error is None
                if outcome.error is not None:
                    self._degrade(outcome.error)
                continue
            table.commit(reservation, digest, ahead=ahead)
            if self._sums is not None and outcome.sums is not None:
                self._sums[reservation.slot] = outcome.sums
            self._index.note(reservation.slot, (digest, reservation.blocks))
            kept += 1
            self._advance(len(item.plaintext))
        self.admitted += kept
        if kept and self._degraded and all(outcome.error is None for outcome in written):
            log.warning("cache %s: the disk takes writes again", self.file.path)
            self._degraded = None
        return kept + twice

    def _advance(self, admitted: int) -> None:
        # A chunk's own first use must be over before a tick or two have passed, so a tick is a
        # good part of the probationary queue.
        self._admitted_bytes += admitted
        if self._admitted_bytes * 40 >= self.settings.budget_bytes:
            self._admitted_bytes = 0
            self.table.recency.advance()

    async def _keep_ticking(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self.table.recency.advance()

    # --- failures

    def _degrade(self, error: OSError) -> None:
        kind = "the disk is full" if error.errno in _FULL else "the disk refuses writes"
        reason = f"{kind}: {error.strerror}"
        if self._degraded != reason:
            log.warning("cache %s: %s; passing through", self.file.path, reason)
        self._degraded = reason
        self._retry_at = asyncio.get_running_loop().time() + self.settings.retry_seconds
        self.refused += 1

    def _tampered(self) -> None:
        log.warning("cache %s: its size was changed by somebody; checking all", self.file.path)
        self.table.distrust_all()
        try:
            self.file.heal_size()
        except OSError as error:
            self._degrade(error)

    def _quarantine(self, slot: int, digest: bytes, reason: str, *, lost: bool = False) -> None:
        if self.table.find(digest) != slot:
            return
        log.warning("cache chunk %s in slot %d: %s; dropped", digest.hex(), slot, reason)
        self.table.drop(slot, lost=lost)
        self.quarantined += 1
        self._index.note(slot, None)
        self._index.keep_evidence(slot, digest, reason)

    # --- the index

    def note_recovered(self, slot: int) -> None:
        """A chunk that no index named was found in a slot: write it down."""
        self._index.note(slot, (self.table.digest_of(slot), self.table.blocks[slot]))

    def _note_evictions(self) -> None:
        evicted, self.table.evicted = self.table.evicted, []
        for slot in evicted:
            self._index.note(slot, None)

    def _run(self, job: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._io, job)

    async def run(self, job: Callable[[], T]) -> T:
        """A blocking call on the arena's files, in its bounded executor."""
        return await self._run(job)


def _refusal(directory: Path, error: OSError) -> Exception:
    text = f"cache directory {directory}: {error.strerror}"
    if error.errno in _FULL:
        return NoSpace(text, remedy="free space, or choose another directory")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Denied(text, remedy="give its owner the right to write there")
    return Unavailable(text, remedy=f"see {os.fspath(directory)}")
