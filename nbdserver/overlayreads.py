"""The reading half of an overlay: what it holds itself, what reads as zeros, what the base answers.

It owns the map of blocks and the mapped data file; who writes them is overlay.py.
"""

import asyncio
import errno
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nbdserver.blockmap import FROM_BASE, OWN_DATA, OWN_ZERO, open_data, replay
from nbdserver.device import (
    BASE_ALLOCATION,
    STATE_HOLE,
    STATE_ZERO,
    BaseDevice,
    BlockSizes,
    Buffer,
    Device,
    DeviceError,
    Extent,
)
from nbdserver.journal import BLOCK, Journal

_ZEROS = memoryview(bytes(1 << 20))


class OverlayReads(BaseDevice):
    """Reads, extents and observations of an overlay whose journal was read."""

    def __init__(self, path: Path, base: Device, journal: Journal) -> None:
        self.path = path
        self.base = base
        self._journal = journal
        self.size, self._map = replay(journal.header, journal.records)
        journal.records = []
        self._room = len(self._map.states) * BLOCK
        self._fd = open_data(path, self._room)
        self._mmap = mmap.mmap(self._fd, self._room, mmap.MAP_SHARED, mmap.PROT_READ)
        self._view = memoryview(self._mmap)
        self._base_size = journal.header.base_size
        self.description = base.description
        self.block_sizes = BlockSizes(maximum=base.block_sizes.maximum)
        self.contexts = tuple(base.contexts)

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks held here."""
        return self._map.data_blocks * BLOCK

    def try_read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """Slices of the data file's map, of zeros, and of what the base has at hand."""
        first = offset // BLOCK
        last = (offset + length - 1) // BLOCK
        states = self._map.states
        state = states[first]
        if first == last or states.count(state, first, last + 1) == last + 1 - first:
            if state == OWN_DATA:
                return (self._view[offset : offset + length],)
            if state == FROM_BASE and offset + length <= self._base_size:
                return self.base.try_read(offset, length)
        buffers: list[Buffer] = []
        for state, start, end in self._pieces(offset, length):
            if state == OWN_DATA:
                buffers.append(self._view[start:end])
            elif state == OWN_ZERO:
                buffers += _zeros(end - start)
            else:
                found = self.base.try_read(start, end - start)
                if found is None:
                    return None
                buffers += found
        return buffers

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(state, start, end) in bytes, in order; beyond the base's end its blocks are zeros."""
        first = offset // BLOCK
        count = (offset + length - 1) // BLOCK + 1 - first
        end = offset + length
        for state, start_block, blocks in self._map.runs(first, count):
            start = max(start_block * BLOCK, offset)
            stop = min((start_block + blocks) * BLOCK, end)
            if state == FROM_BASE and stop > self._base_size:
                if start < self._base_size:
                    yield FROM_BASE, start, self._base_size
                yield OWN_ZERO, max(start, self._base_size), stop
            else:
                yield state, start, stop

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Have the base fetch what it must, then answer from the maps, or with a copy."""
        pieces = list(self._pieces(offset, length))
        if len(pieces) == 1 and pieces[0][0] == FROM_BASE:
            return await self.base.read(offset, length)
        for state, start, end in pieces:
            if state == FROM_BASE:
                await self.base.read(start, end - start)
        buffers = self.try_read(offset, length)
        if buffers is not None:
            return buffers
        return (await self.read_copied(offset, length),)

    async def read_copied(self, offset: int, length: int) -> bytes:
        """A private copy."""
        parts = []
        for state, start, end in list(self._pieces(offset, length)):
            if state == OWN_DATA:
                parts.append(await asyncio.to_thread(self._pread, start, end - start))
            elif state == OWN_ZERO:
                parts.append(bytes(end - start))
            else:
                parts.append(await self.base.read_copied(start, end - start))
        return b"".join(parts)

    def _pread(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as failure:
            raise DeviceError(failure.errno or errno.EIO) from failure
        if len(data) != length:
            raise DeviceError(errno.EIO, "the overlay's data file is cut short")
        return data

    def pin(self, offset: int, length: int) -> Callable[[], None]:
        """Pin what came from the base; the overlay's own pages stay."""
        releases = [
            self.base.pin(start, end - start)
            for state, start, end in self._pieces(offset, length)
            if state == FROM_BASE
        ]

        def release() -> None:
            for each in releases:
                each()

        return release

    async def cache(self, offset: int, length: int) -> None:
        """The base's business."""
        for state, start, end in list(self._pieces(offset, length)):
            if state == FROM_BASE:
                await self.base.cache(start, end - start)

    async def extents(
        self, context: str, offset: int, length: int, *, one: bool
    ) -> Sequence[Extent]:
        """Own data is allocated, own zeros are holes, the rest is as the base says."""
        extents: list[Extent] = []
        for state, start, end in list(self._pieces(offset, length)):
            if state == FROM_BASE:
                left = end - start
                for extent in await self.base.extents(context, start, left, one=one):
                    # The base may tell of more than was asked: there our own map counts.
                    extents.append(Extent(min(extent.length, left), extent.flags))
                    left -= extents[-1].length
                    if left == 0:
                        break
                if left:
                    break  # The base told of less: what follows would be misplaced.
            elif context == BASE_ALLOCATION:
                flags = STATE_HOLE | STATE_ZERO if state == OWN_ZERO else 0
                extents.append(Extent(end - start, flags))
            else:
                extents.append(Extent(end - start, 0))
            if one and extents:
                break
        return extents

    def observe(self, batch: Sequence[tuple[int, int, bool]]) -> None:
        """Reads that the base answered, at least in part."""
        states = self._map.states
        seen = [
            item
            for item in batch
            if states.find(FROM_BASE, item[0] // BLOCK, (item[0] + item[1] - 1) // BLOCK + 1) >= 0
        ]
        if seen:
            self.base.observe(seen)


def _zeros(length: int) -> list[Buffer]:
    whole, rest = divmod(length, len(_ZEROS))
    return [*([_ZEROS] * whole), *([_ZEROS[:rest]] if rest else [])]
