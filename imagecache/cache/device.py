"""A block image as a device: hits from the arena's map, misses from the fetcher."""

from __future__ import annotations

import asyncio
import errno
from bisect import bisect_right
from collections.abc import Callable, Sequence

from imagecache.cache.arena import Arena
from imagecache.cache.counters import DeviceCounters
from imagecache.cache.events import ORDER, Cause, ReadRecorder, Wait
from imagecache.cache.fetch import Fetcher
from imagecache.cache.flight import Flight
from imagecache.cache.image import HOLE, ImageMap
from imagecache.cache.readahead import ReadAhead
from imagecache.cache.settings import Integrity
from imagecache.cache.slotfile import SLOT_SHIFT
from imagecache.errors import CubecacheError, Denied, NoSpace, Unavailable, UsageError
from imagecache.store.base import Priority
from nbdserver.device import (
    BASE_ALLOCATION,
    STATE_HOLE,
    STATE_ZERO,
    BlockSizes,
    Buffer,
    DeviceError,
    Extent,
    ReadOnlyDevice,
)

LOCAL_CONTEXT = "cubecache:local"
"""A metadata context: flag LOCAL where a read is answered from this host, 0 where it is fetched."""

LOCAL = 1

# The border's one table: what a failed read says to the client. Everything else is EIO.
ERRNO: tuple[tuple[type[CubecacheError], int], ...] = (
    (UsageError, errno.EINVAL),
    (NoSpace, errno.ENOSPC),
    (Denied, errno.EIO),
    (CubecacheError, errno.EIO),
)

_ZEROS = memoryview(bytes(1 << 20))
_MAX_EXTENTS = 4096
_MAX_CACHE_CHUNKS = 1024  # of one CACHE request; it is a hint


def errno_of(error: CubecacheError) -> int:
    """The errno of an error by `ERRNO`."""
    return next(number for kind, number in ERRNO if isinstance(error, kind))


class _Parts:
    """What one waiting read has so far: private copies by chunk, pinned slots, and why it waits."""

    __slots__ = ("causes", "held", "pins", "until")

    def __init__(self, until: float) -> None:
        self.until = until
        self.held: dict[int, bytes] = {}
        self.pins: list[int] = []
        self.causes: list[Cause] = []


class BlockImageDevice(ReadOnlyDevice):
    """One export of a block image. Stateless towards clients; positions are the image's."""

    can_cache = True
    contexts: Sequence[str] = (BASE_ALLOCATION, LOCAL_CONTEXT)
    block_sizes = BlockSizes(minimum=1, preferred=4096, maximum=32 << 20)

    def __init__(
        self,
        image: ImageMap,
        arena: Arena,
        fetcher: Fetcher,
        *,
        recorder: ReadRecorder | None = None,
        description: str = "",
        read_ahead: bool = True,
    ) -> None:
        self.size = image.size_bytes
        self.description = description
        self.recorder = recorder
        self.counters = DeviceCounters()
        self._image = image
        self._arena = arena
        self._fetcher = fetcher
        self.ahead = ReadAhead(image, fetcher) if read_ahead else None
        self._closed = False
        # Columns and views that every hit reads, without a second attribute look-up.
        self._table = arena.table
        self._recency = arena.table.recency
        self._touched = arena.table.recency.touched
        self._serials = arena.table.serials
        self._view = arena.view
        self._shift, self._hints = image.shift, image.hints
        self._starts, self._ends = image.starts, image.ends
        self._deltas, self._ordinals = image.deltas, image.ordinals
        self._slots, self._known = image.slots, image.known

    # --- reading

    def try_read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """Views of the map and of zeros, or None where a chunk has no known position."""
        granule = offset >> self._shift
        hints = self._hints
        index = bisect_right(self._starts, offset, hints[granule], hints[granule + 1]) - 1
        end = offset + length
        if index >= 0 and end <= self._ends[index]:
            ordinal = self._ordinals[index]
            slot = self._slots[ordinal]
            if self._serials[slot] == self._known[ordinal]:
                self._touched[slot] = self._recency.tick
                at = (slot << SLOT_SHIFT) + self._deltas[index] + offset
                return (self._view[at : at + length],)
        return self._views(offset, end, {})

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """As `try_read`, after fetching what is missing; DeviceError after the deadline."""
        return await self._gather(offset, length, copied=False)

    async def read_copied(self, offset: int, length: int) -> bytes:
        """Bytes read from the disk and compared with their digests; what is bad is fetched."""
        self.counters.copies += 1
        return b"".join(await self._gather(offset, length, copied=True))

    def pin(self, offset: int, length: int) -> Callable[[], None]:
        """Pins the slots that views of this range point to."""
        table, slots = self._table, []
        for ordinal in self._image.ordinals_in(offset, offset + length):
            slot = self._slots[ordinal]
            if self._serials[slot] == self._known[ordinal]:
                table.pin(slot)
                slots.append(slot)

        def release() -> None:
            while slots:
                table.unpin(slots.pop())

        return release

    def _position(self, ordinal: int, index: int) -> int:
        """The slot of a chunk that may be shown, remembered for the next time; -1 without one."""
        slot = self._slots[ordinal]
        if self._serials[slot] == self._known[ordinal]:
            return slot
        slot = self._table.checked(self._image.digest(ordinal))
        if slot >= 0:
            if self.ahead is not None:
                self.ahead.touched(index, index)
            self._slots[ordinal] = slot
            self._known[ordinal] = self._serials[slot]
        return slot

    def _views(self, offset: int, end: int, held: dict[int, bytes]) -> list[Buffer] | None:
        """Buffers of a range; chunks in `held` come from there. None where one has no position."""
        found: list[Buffer] = []
        tick = self._recency.tick
        for at, stop, index in self._image.pieces(offset, end):
            if index == HOLE:
                found += zeros(stop - at)
                continue
            ordinal = self._ordinals[index]
            start = at + self._deltas[index]
            if ordinal in held:
                found.append(memoryview(held[ordinal])[start : start + stop - at])
                continue
            piece = self._piece(ordinal, index, start, stop - at, tick)
            if piece is None:
                return None
            found.append(piece)
        return found

    def _piece(self, ordinal: int, index: int, start: int, length: int, tick: int) -> Buffer | None:
        slot = self._position(ordinal, index)
        if slot < 0:
            return None
        self._touched[slot] = tick
        at = (slot << SLOT_SHIFT) + start
        return self._view[at : at + length]

    async def _gather(self, offset: int, length: int, *, copied: bool) -> list[Buffer]:
        end = offset + length
        if self._closed:
            raise DeviceError(errno.ESHUTDOWN, "the export was closed")
        if offset < 0 or length < 0 or end > self.size:
            raise DeviceError(errno.EINVAL, f"{offset}+{length} is outside the disk")
        if not copied and (views := self._views(offset, end, {})) is not None:
            return views
        loop = asyncio.get_running_loop()
        begin = loop.time()
        parts = _Parts(begin + self._fetcher.settings.stall_seconds)
        extents = [index for _, _, index in self._image.pieces(offset, end) if index != HOLE]
        ordinals = list(dict.fromkeys(self._ordinals[index] for index in extents))
        if self.ahead is not None and extents:
            self.ahead.touched(extents[0], extents[-1])
        failure: CubecacheError | None = None
        try:
            while True:
                await self._bring(ordinals, parts, copied=copied)
                found = self._views(offset, end, parts.held)
                if found is not None:
                    return found
                # What was here at first was quarantined while the rest came: once more.
                if loop.time() >= parts.until:
                    raise Unavailable(f"{offset}+{length} did not stay long enough to be read")
        except CubecacheError as error:
            failure = error
            raise DeviceError(errno_of(error), str(error)) from error
        finally:
            for slot in parts.pins:
                self._table.unpin(slot)
            self._account(
                Wait(
                    begin=begin,
                    seconds=loop.time() - begin,
                    offset=offset,
                    length=length,
                    chunks=len(parts.held),
                    cause=min(parts.causes, key=ORDER.__getitem__, default=Cause.COPY),
                    error=None if failure is None else str(failure),
                )
            )

    async def _bring(self, ordinals: Sequence[int], parts: _Parts, *, copied: bool) -> None:
        """Pins, or copies, the chunks that are here, and fetches those that are not."""
        missing = []
        for ordinal in ordinals:
            digest = self._image.digest(ordinal)
            if ordinal in parts.held:
                continue
            if copied:
                copy = await self._arena.copy(digest)
                if copy is not None:
                    parts.held[ordinal] = copy
                    continue
            elif (slot := self._table.checked(digest)) >= 0:
                self._table.pin(slot)
                parts.pins.append(slot)
                continue
            missing.append(ordinal)
        if missing:
            await self._fetch(missing, parts)

    async def _fetch(self, missing: Sequence[int], parts: _Parts) -> None:
        """Brings chunks, trying again until the deadline while the store is away."""
        loop = asyncio.get_running_loop()
        settings = self._fetcher.settings
        pause = settings.retry_first_seconds
        foreign = True
        last: CubecacheError | None = None
        while True:
            wanted = self._fetcher.request(self._image, missing, Priority.DEMAND)
            await self._fetcher.wait((flight for flight, _ in wanted), parts.until)
            parts.causes += [Cause.ROT if flight.rotten else cause for flight, cause in wanted]
            failed: list[int] = []
            errors: list[tuple[Flight, CubecacheError]] = []
            for ordinal, (flight, _) in zip(missing, wanted, strict=True):
                if flight.plaintext is not None:
                    parts.held[ordinal] = flight.plaintext
                    continue
                failed.append(ordinal)
                errors.append(
                    (flight, flight.error or _stalled(flight, settings.stall_seconds, last))
                )
            if not failed:
                return
            missing, last = failed, errors[0][1]
            final = [e for e in errors if not isinstance(e[1], Unavailable)]
            if final:
                # Another image's location of the chunk may be gone or bad while ours is right.
                if not foreign or all(flight.image is self._image for flight, _ in final):
                    raise final[0][1]
                foreign = False
                continue
            if loop.time() + pause >= parts.until or self._closed:
                raise errors[0][1]
            await asyncio.sleep(pause)
            pause = min(2 * pause, settings.retry_most_seconds)

    def _account(self, wait: Wait) -> None:
        self.counters.misses += 1
        self.counters.waited_seconds += wait.seconds
        self._fetcher.counters.waits[wait.cause].add(wait.seconds)
        self.counters.errors += wait.error is not None
        if self.recorder is not None:
            self.recorder.waited(wait)

    # --- the rest of the protocol

    def observe(self, batch: Sequence[tuple[int, int, bool]]) -> None:
        """Passes a batch on to whoever records this export."""
        if self.recorder is not None:
            self.recorder.reads(batch)

    async def cache(self, offset: int, length: int) -> None:
        """Asks for a range ahead of reading it, up to a bound, and does not wait for it."""
        table, wanted = self._table, []
        for _, _, index in self._image.pieces(offset, min(offset + length, self.size)):
            if index == HOLE:
                continue
            ordinal = self._ordinals[index]
            if table.checked(self._image.digest(ordinal)) < 0:
                wanted.append(ordinal)
            if len(wanted) >= _MAX_CACHE_CHUNKS:
                break
        self._fetcher.request(self._image, dict.fromkeys(wanted), Priority.PREFETCH)

    async def extents(
        self, context: str, offset: int, length: int, *, one: bool
    ) -> Sequence[Extent]:
        """What is allocated (`base:allocation`), or here (`cubecache:local`); neighbours merged.

        The answer may end before the range does, after some thousand extents.
        """
        found: list[list[int]] = []
        for at, stop, index in self._image.pieces(offset, min(offset + length, self.size)):
            if context == LOCAL_CONTEXT:
                flags = LOCAL if index == HOLE or self._is_local(index) else 0
            else:
                flags = STATE_HOLE | STATE_ZERO if index == HOLE else 0
            if found and found[-1][1] == flags:
                found[-1][0] += stop - at
            elif found and (one or len(found) >= _MAX_EXTENTS):
                break
            else:
                found.append([stop - at, flags])
        return [Extent(size, flags) for size, flags in found]

    def _is_local(self, index: int) -> bool:
        return self._arena.holds(self._image.digest(self._ordinals[index]))

    async def close(self) -> None:
        """Reads that come later are refused; those that wait end at their own time."""
        self._closed = True


class CheckedImageDevice(BlockImageDevice):
    """The device for the policy `every-read`: what is sent is a private, compared copy."""

    def try_read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """Copies of blocks whose sums match, or None where that would block."""
        return self._views(offset, offset + length, {})

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """As `try_read`, from copies of whole chunks where it has to wait."""
        views = self._views(offset, offset + length, {})
        return await self._gather(offset, length, copied=True) if views is None else views

    def pin(self, offset: int, length: int) -> Callable[[], None]:  # noqa: ARG002 - the protocol's
        """Private copies need no pin."""
        return _nothing

    def _piece(self, ordinal: int, index: int, start: int, length: int, tick: int) -> Buffer | None:
        slot = self._position(ordinal, index)
        if slot < 0:
            return None
        self._touched[slot] = tick
        return self._arena.peek(slot, start, length)


def open_device(
    image: ImageMap,
    arena: Arena,
    fetcher: Fetcher,
    *,
    recorder: ReadRecorder | None = None,
    description: str = "",
    read_ahead: bool = True,
) -> BlockImageDevice:
    """A device over an image, by the arena's integrity policy."""
    checked = arena.settings.integrity is Integrity.EVERY_READ
    kind = CheckedImageDevice if checked else BlockImageDevice
    return kind(
        image,
        arena,
        fetcher,
        recorder=recorder,
        description=description,
        read_ahead=read_ahead,
    )


def zeros(length: int) -> list[Buffer]:
    """Buffers of `length` zero bytes together, all of them one shared piece of memory."""
    whole, rest = divmod(length, len(_ZEROS))
    found: list[Buffer] = [_ZEROS] * whole
    if rest:
        found.append(_ZEROS[:rest])
    return found


def _stalled(flight: Flight, seconds: float, last: CubecacheError | None) -> Unavailable:
    text = f"chunk {flight.digest.hex()} did not arrive within {seconds:g} seconds"
    return Unavailable(f"{text}; before that: {last.message}" if last else text)


def _nothing() -> None:
    """Release nothing."""
