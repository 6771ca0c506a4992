"""One long range as it arrives: the data plane's streaming form, for boot packs.

A stream is one attempt without retries or hedges: whoever reads it can fall back on ranged reads of
what has not come. What the bytes mean is the reader's to verify.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from imagecache.errors import CubecacheError, Unavailable
from imagecache.store.base import OriginProtocol, Priority, RangeReader, check_range
from imagecache.store.counters import ClassCounters

_PIECE_BYTES = 1 << 20
_PIECES_AHEAD = 2


class StreamReader(Protocol):
    """Where a long range can be read piece by piece."""

    def stream(self, key: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Pieces of the range in order, `length` bytes in all, or an error on the way."""
        ...


class PiecewiseStream:
    """A stream made of ranged reads, for stores on this host: no first byte to save there."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader

    async def stream(self, key: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """As the protocol; two pieces are read ahead."""
        check_range(key, offset, length)
        end = offset + length
        loop = asyncio.get_running_loop()
        coming: list[asyncio.Task[bytes]] = []
        try:
            while offset < end or coming:
                while offset < end and len(coming) < _PIECES_AHEAD:
                    size = min(_PIECE_BYTES, end - offset)
                    read = self._reader.read(key, offset, size, priority=Priority.PREFETCH)
                    coming.append(loop.create_task(read))
                    offset += size
                yield await coming.pop(0)
        finally:
            for task in coming:
                task.cancel()
            await asyncio.gather(*coming, return_exceptions=True)


class FirstStream:
    """Asks several sources in turn until one sends its first piece; counts what comes."""

    def __init__(self, sources: Sequence[tuple[StreamReader, ClassCounters]]) -> None:
        self._sources = tuple(sources)

    async def stream(self, key: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """As the protocol; raises what the last source raised."""
        failure: CubecacheError = Unavailable(f"nobody could be asked for {key}")
        for source, counters in self._sources:
            sent = 0
            counters.requests += 1
            pieces = source.stream(key, offset, length)
            async with contextlib.aclosing(pieces):
                try:
                    async for piece in pieces:
                        counters.bytes += len(piece)
                        sent += len(piece)
                        yield piece
                except CubecacheError as error:
                    counters.errors += 1
                    failure = error
            if sent == length:
                return
            if sent:
                raise OriginProtocol(f"the stream of {key} broke off after {sent} bytes: {failure}")
        raise failure
