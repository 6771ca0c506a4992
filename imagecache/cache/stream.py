"""A boot pack on its way: one GET whose chunks become visible one by one, as they arrive.

A read that wants a chunk of the stream waits for it where that is soonest, else overtakes: its own
GET is sent, and whichever comes first serves it. What the stream does not bring, for whatever
reason, is fetched from where the image itself has it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from imagecache.blockimage.locations import Location
from imagecache.cache.decode import Wanted
from imagecache.cache.fetch import Fetcher
from imagecache.cache.flight import Flight, Stage
from imagecache.cache.image import ImageMap
from imagecache.chunks import BLOCK
from imagecache.errors import Corrupt, CubecacheError
from imagecache.packs.pack import PackedChunk
from imagecache.store.base import Priority
from imagecache.store.stream import StreamReader

_DECODED_AT_ONCE = 4
_DECODING_GROUPS = 2
_WATCH_SECONDS = 0.05
_LEAST_SHARE = 0.5  # of a pack's bytes must be missing here for one GET of all to be worth it
_FIRST_RATE = 50e6  # bytes per second, until the stream shows its own


@dataclass(frozen=True, slots=True)
class StreamOutcome:
    """What a stream did. Bytes are stored bytes; `overtaken` chunks came by their own GET too."""

    chunks: int
    bytes: int
    already_here: int
    overtaken: int
    left: int  # chunks that it did not bring: asked for elsewhere
    seconds: float
    first_byte_seconds: float | None
    error: str | None


def is_far(ahead_bytes: float, rate: float, silent_for: float, get_seconds: float) -> bool:
    """Whether an own GET beats waiting for bytes of a stream that are `ahead_bytes` away. Pure.

    `silent_for` are the seconds since the stream last sent something; `get_seconds` what a GET of
    one chunk takes at the moment. A stream in doubt is given a quarter more.
    """
    if silent_for > 2 * get_seconds:
        return True
    return ahead_bytes / max(rate, 1.0) > 1.25 * get_seconds


class BootStream:
    """One streaming GET of a boot pack into the arena. Use once: `run`."""

    def __init__(
        self,
        fetcher: Fetcher,
        streamer: StreamReader,
        image: ImageMap,
        *,
        key: str,
        pack: bytes,
        chunks: Sequence[tuple[int, PackedChunk]],
    ) -> None:
        """`chunks` are (ordinal in the image, place in the pack), in the order of the pack."""
        self._fetcher = fetcher
        self._streamer = streamer
        self._image = image
        self._key = key
        self._pack = pack
        self._chunks = chunks
        self._flights: dict[int, Flight] = {}  # by index in chunks
        self._ends: dict[Flight, int] = {}
        self._received = 0
        self._begin = self._last = 0.0
        self._first: float | None = None
        self._overtaken = 0
        self._brought = 0

    # --- what a waiting read asks

    def is_far(self, flight: Flight) -> bool:
        """Whether a read should not wait for this flight to arrive here."""
        now = asyncio.get_running_loop().time()
        end = self._ends.get(flight)
        if end is None:
            return True
        spent = now - self._first if self._first is not None else 0.0
        rate = self._received / spent if spent > 0 and self._received > 1 << 18 else _FIRST_RATE
        return is_far(end - self._received, rate, now - self._last, self._fetcher.demand_seconds)

    def overtaken(self, flight: Flight) -> None:
        """A read sent its own GET for this flight."""
        self._ends.pop(flight, None)
        self._overtaken += 1

    # --- the stream's own side

    async def run(self) -> StreamOutcome:
        """Brings what is missing here; returns when all of it has ended, one way or another."""
        loop = asyncio.get_running_loop()
        self._begin = self._last = loop.time()
        for index, (ordinal, _) in enumerate(self._chunks):
            flight = self._fetcher.take_off(self._image, ordinal)
            if flight is not None:
                self._flights[index] = flight
        total = sum(place.stored_length for _, place in self._chunks)
        missing = sum(self._chunks[index][1].stored_length for index in self._flights)
        here = len(self._chunks) - len(self._flights)
        error: str | None = None
        if not self._flights:
            return StreamOutcome(0, 0, here, 0, 0, 0.0, None, None)
        flights = list(self._flights.values())
        if missing < total * _LEAST_SHARE:
            for flight in flights:
                self._fetcher.give_back(flight)
            error = "most of it is here already: the rest comes by ranged reads"
        else:
            for index, flight in self._flights.items():
                place = self._chunks[index][1]
                flight.stream = self
                self._ends[flight] = place.offset + place.stored_length
            watch = loop.create_task(self._watch())
            try:
                await self._receive()
            except CubecacheError as failure:
                error = str(failure)
            finally:
                watch.cancel()
                self._give_back()
        await self._fetcher.wait_kept(flights)
        return StreamOutcome(
            chunks=self._brought,
            bytes=self._received,
            already_here=here,
            overtaken=self._overtaken,
            left=len(flights) - self._brought,
            seconds=loop.time() - self._begin,
            first_byte_seconds=None if self._first is None else self._first - self._begin,
            error=error,
        )

    def _give_back(self) -> None:
        """Flights that the stream will not bring become ordinary ones."""
        for flight in self._flights.values():
            if flight.stage is Stage.FETCHING and flight.stream is self:
                self._fetcher.give_back(flight)
        self._ends.clear()

    async def _watch(self) -> None:
        """Reads that wait for a stream that became slow are not left waiting."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for flight in tuple(self._ends):
                if flight.priority is Priority.DEMAND and flight.stage is Stage.FETCHING:
                    self._fetcher.overtake_where_far(flight)

    async def _receive(self) -> None:
        first = min(self._flights)
        last = max(self._flights)
        start = self._chunks[first][1].offset
        end = self._chunks[last][1].offset + self._chunks[last][1].stored_length
        for flight in self._ends:
            self._ends[flight] -= start
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        at = start  # the pack's offset of the buffer's first byte
        index = first
        ready: list[int] = []
        groups: deque[asyncio.Task[int]] = deque()
        pieces = self._streamer.stream(self._key, start, end - start)
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    self._last = loop.time()
                    if self._first is None:
                        self._first = self._last
                    self._received += len(piece)
                    buffer += piece
                    while index <= last and self._end_of(index) <= at + len(buffer):
                        ready.append(index)
                        index += 1
                    while ready and (len(ready) >= _DECODED_AT_ONCE or not groups):
                        group, ready = ready[:_DECODED_AT_ONCE], ready[_DECODED_AT_ONCE:]
                        stop = self._end_of(group[-1])
                        body = bytes(memoryview(buffer)[: stop - at])
                        groups.append(loop.create_task(self._land(body, at, group)))
                        del buffer[: stop - at]
                        at = stop
                    while groups and (groups[0].done() or len(groups) > _DECODING_GROUPS):
                        self._brought += await groups.popleft()
            if ready:
                groups.append(loop.create_task(self._land(bytes(buffer), at, ready)))
        except CubecacheError:
            await self._settle(groups)  # what had come before the line broke is whole
            raise
        else:
            await self._settle(groups)
        finally:
            for task in groups:
                task.cancel()

    async def _settle(self, groups: deque[asyncio.Task[int]]) -> None:
        while groups:
            self._brought += await groups.popleft()

    def _end_of(self, index: int) -> int:
        place = self._chunks[index][1]
        return place.offset + place.stored_length

    async def _land(self, body: bytes, offset: int, group: Sequence[int]) -> int:
        """Verifies some chunks of the stream and makes them visible; how many were right."""
        flights: list[Flight] = []
        wanted: list[Wanted] = []
        for index in group:
            flight = self._flights.get(index)
            if flight is not None and flight.stage < Stage.LANDED:
                place = self._chunks[index][1]
                location = Location(
                    self._pack, place.offset, place.stored_length, place.codec, place.key_id
                )
                flights.append(flight)
                size = place.blocks * BLOCK
                wanted.append(Wanted(location, size, flight.digest, self._image.seals))
        if not flights:
            return 0
        found = await self._fetcher.decode(body, offset, wanted)
        right: list[tuple[Flight, bytes]] = []
        for flight, plaintext in zip(flights, found, strict=True):
            self._ends.pop(flight, None)
            if isinstance(plaintext, Corrupt):
                self._fetcher.refuse_streamed(self._key, flight, plaintext)
            else:
                right.append((flight, plaintext))
        await self._fetcher.deliver(right, len(body))
        return len(right)
