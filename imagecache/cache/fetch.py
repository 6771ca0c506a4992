"""The fetcher: one flight per chunk, neighbours in one read, demand before all else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from imagecache.cache.arena import Arena
from imagecache.cache.counters import FetchCounters
from imagecache.cache.decode import Wanted, decode_all, is_lone_raw
from imagecache.cache.events import Cause
from imagecache.cache.flight import Flight, Stage
from imagecache.cache.image import ImageMap
from imagecache.cache.plan import Get, plan_gets
from imagecache.cache.settings import FetchSettings
from imagecache.errors import Corrupt, CubecacheError, Unavailable
from imagecache.store.base import Priority, RangeReader

log = logging.getLogger(__name__)

_PLANNED_AT_ONCE = 256
_DECODED_AT_ONCE = 4
_DECODED_AHEAD = 8
_FIRST_DEMAND_SECONDS = 0.05


class Fetcher:
    """Brings chunks of any image into the arena. All methods belong to its loop."""

    def __init__(
        self, reader: RangeReader, arena: Arena, settings: FetchSettings | None = None
    ) -> None:
        """The caller closes the reader, after this."""
        self.settings = settings or FetchSettings()
        self.counters = FetchCounters()
        self.arena = arena
        self._reader = reader
        self._flights: dict[bytes, Flight] = {}
        self._queues: tuple[dict[Flight, None], ...] = tuple({} for _ in Priority)
        self._running = [0 for _ in Priority]
        self._landing = [0 for _ in Priority]  # bodies that are here and are being decoded
        self._tasks: set[asyncio.Task[None]] = set()
        self._cpu = ThreadPoolExecutor(self.settings.decoders, thread_name_prefix="decode")
        self._pumping = False
        self._closed = False
        self.demand_seconds = _FIRST_DEMAND_SECONDS  # what a demand GET takes, as of late

    # --- asking

    def request(
        self, image: ImageMap, ordinals: Iterable[int], priority: Priority
    ) -> list[tuple[Flight, Cause]]:
        """A flight for each chunk, new or joined, and why whoever waits for it waits.

        Whatever is asked for before the loop turns is planned together. Ahead of demand, chunks
        beyond `max_queued_ahead` get no flight.
        """
        found = []
        for ordinal in ordinals:
            digest = image.digest(ordinal)
            flight = self._flights.get(digest)
            if flight is not None:
                found.append((flight, self._join(flight, priority)))
            elif self._has_room(priority):
                flight = self._begin(image, ordinal, digest, priority)
                first_use = flight.stage is Stage.CHECKING
                found.append((flight, Cause.FIRST_USE if first_use else Cause.COLD))
            else:
                self.counters.dropped_ahead += 1
        return found

    async def wait(self, flights: Iterable[Flight], until: float | None = None) -> None:
        """Returns when all have ended, or at the loop's time `until`. Cancelling ends no flight."""
        waiting = {flight.done for flight in flights if not flight.done.done()}
        if waiting:
            loop = asyncio.get_running_loop()
            timeout = None if until is None else max(0.0, until - loop.time())
            await asyncio.wait(waiting, timeout=timeout)

    async def wait_kept(self, flights: Iterable[Flight]) -> None:
        """Returns when all have ended and the arena has written what it takes of them."""
        waiting = {flight.over for flight in flights if not flight.over.done()}
        if waiting:
            await asyncio.wait(waiting)

    async def prefetch(
        self, image: ImageMap, ordinals: Iterable[int], *, priority: Priority = Priority.PREFETCH
    ) -> None:
        """Brings what is missing of these chunks, in this order; failures are only counted."""
        missing = [n for n in ordinals if not self.arena.holds(image.digest(n))]
        step = self.settings.max_queued_ahead // 2
        for at in range(0, len(missing), step):
            wanted = self.request(image, missing[at : at + step], priority)
            await self.wait_kept(flight for flight, _ in wanted)

    @property
    def flying(self) -> int:
        """Flights that have not ended."""
        return len(self._flights)

    @property
    def queued(self) -> tuple[int, ...]:
        """Chunks that wait for a GET, by class."""
        return tuple(len(queue) for queue in self._queues)

    async def close(self) -> None:
        """Ends all flights, with an error where they are not done; safe to call twice."""
        self._closed = True
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for flight in tuple(self._flights.values()):
            self._end(flight, Unavailable("the fetcher was stopped"))
        await asyncio.get_running_loop().run_in_executor(None, self._cpu.shutdown)

    # --- flights

    def _has_room(self, priority: Priority) -> bool:
        return priority is Priority.DEMAND or (
            len(self._queues[priority]) < self.settings.max_queued_ahead
        )

    def _begin(self, image: ImageMap, ordinal: int, digest: bytes, priority: Priority) -> Flight:
        flight = Flight(image, ordinal, digest, priority)
        if self._closed:
            self._end(flight, Unavailable("the fetcher was stopped"))
            return flight
        self._flights[digest] = flight
        if self.arena.holds(digest):
            flight.stage = Stage.CHECKING
            self._spawn(self._check(flight))
        else:
            self._enqueue(flight)
        return flight

    def _join(self, flight: Flight, priority: Priority) -> Cause:
        was = flight.priority
        if priority is Priority.DEMAND:
            self.counters.joins += 1
        if priority < was:
            flight.priority = priority
            if flight.stage is Stage.QUEUED:
                self._queues[was].pop(flight, None)
                self._enqueue(flight)
                self.counters.upgrades += 1
        if priority is Priority.DEMAND:
            self.overtake_where_far(flight)
        if flight.stage is Stage.CHECKING:
            return Cause.FIRST_USE
        return Cause.JOINED if was is Priority.DEMAND else Cause.LATE

    def _enqueue(self, flight: Flight) -> None:
        flight.stage = Stage.QUEUED
        self._queues[flight.priority][flight] = None
        self._pump_soon()

    def _end(self, flight: Flight, error: CubecacheError | None = None) -> None:
        if error is not None:
            flight.fail(error)
        flight.end()
        if self._flights.get(flight.digest) is flight:
            del self._flights[flight.digest]

    # --- what a stream brings (`imagecache.cache.stream`)

    def take_off(self, image: ImageMap, ordinal: int) -> Flight | None:
        """A flight that a stream will carry; None where the chunk is here or on its way."""
        digest = image.digest(ordinal)
        if self._closed or digest in self._flights or self.arena.holds(digest):
            return None
        flight = Flight(image, ordinal, digest, Priority.PREFETCH)
        flight.stage = Stage.FETCHING
        self._flights[digest] = flight
        return flight

    def overtake_where_far(self, flight: Flight) -> None:
        """Sends an own GET for a flight that its stream would bring later than that."""
        stream = flight.stream
        if stream is not None and flight.stage is Stage.FETCHING and stream.is_far(flight):
            self.counters.overtakes += 1
            stream.overtaken(flight)
            self.give_back(flight)

    def give_back(self, flight: Flight) -> None:
        """A flight that no stream will carry is fetched as any other."""
        flight.stream = None
        if self._closed:
            self._end(flight, Unavailable("the fetcher was stopped"))
        elif flight.stage is Stage.FETCHING:
            self._enqueue(flight)

    def refuse_streamed(self, key: str, flight: Flight, fault: Corrupt) -> None:
        """A stream brought a chunk that is not what it should be."""
        log.error("%s; asking for the image's own copy", fault)
        self.counters.corrupt_bodies += 1
        self._reader.condemn(key)
        if flight.stream is not None:
            self.give_back(flight)

    async def deliver(self, chunks: Sequence[tuple[Flight, bytes]], received: int) -> None:
        """Verified chunks of a stream: wakes who waits, and keeps them; `received` is counted."""
        count = self.counters.by_class[Priority.PREFETCH]
        count.bytes_fetched += received
        count.chunks += len(chunks)
        for flight, plaintext in chunks:
            if flight.stage is Stage.QUEUED:
                self._queues[flight.priority].pop(flight, None)
            flight.stream = None
            flight.land(plaintext)
        try:
            for demanded in (True, False):
                kept = [
                    (flight.digest, plaintext)
                    for flight, plaintext in chunks
                    if (flight.priority is Priority.DEMAND) is demanded
                ]
                if kept:
                    await self.arena.admit(kept, ahead=not demanded)
        finally:  # a flight that landed ends, whatever becomes of the arena's copy
            for flight, _ in chunks:
                self._end(flight)

    async def _check(self, flight: Flight) -> None:
        """Compares a local copy with its digest; what is not right is fetched."""
        try:
            plaintext = await self.arena.copy(flight.digest)
            if plaintext is None:
                flight.rotten = True
                self._enqueue(flight)
                return
            self.counters.first_uses += 1
            flight.land(plaintext)
            self._end(flight)
        except BaseException:
            self._end(flight, Unavailable(f"chunk {flight.digest.hex()} could not be checked"))
            raise

    # --- reads

    def _spawn(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Starts the reads that the budgets allow; nothing starts while a higher class waits."""
        self._pumping = False
        if self._closed:
            return
        settings = self.settings
        limits = (settings.demand_gets, settings.prefetch_gets, settings.fill_gets)
        gaps = (settings.demand_gap_bytes, settings.ahead_gap_bytes, settings.ahead_gap_bytes)
        for priority in Priority:
            queue = self._queues[priority]
            # The line stays busy while bodies are decoded, but not for more than memory allows.
            busy = self._running[priority] + max(0, self._landing[priority] - limits[priority])
            room = limits[priority] - busy
            if queue and room > 0:
                flights = list(islice(queue, _PLANNED_AT_ONCE))
                places = [flight.image.location(flight.ordinal) for flight in flights]
                gets = plan_gets(places, max_bytes=settings.max_get_bytes, max_gap=gaps[priority])
                for get in gets[:room]:
                    members = [flights[number] for number in get.members]
                    for flight in members:
                        del queue[flight]
                        flight.stage = Stage.FETCHING
                    self._running[priority] += 1
                    self._spawn(self._run(get, members, priority))
                if queue and len(gets) < room:
                    self._pump_soon()
            if queue:
                return

    async def _run(self, get: Get, flights: Sequence[Flight], priority: Priority) -> None:
        error: CubecacheError = Unavailable("the fetcher was stopped")
        stage = self._running
        try:
            key = flights[0].image.pack_key(get.pack)
            body = await self._read(key, get.offset, get.length, priority)
            self._running[priority] -= 1
            stage = self._landing
            stage[priority] += 1
            self._pump_soon()
            for group in _groups(flights):
                await self._land(key, get, body, group, priority)
        except CubecacheError as failure:
            error = failure
            self.counters.by_class[priority].failures += 1
        except Exception as failure:
            log.exception("reading pack %s failed", get.pack.hex())
            error = Unavailable(f"reading pack {get.pack.hex()} failed: {failure!r}")
            self.counters.by_class[priority].failures += 1
        finally:
            for flight in flights:
                self._end(flight, error)
            stage[priority] -= 1
            self._pump_soon()

    async def _read(self, key: str, offset: int, length: int, priority: Priority) -> bytes:
        count = self.counters.by_class[priority]
        count.gets += 1
        clock = asyncio.get_running_loop().time
        begin = clock()
        try:
            async with asyncio.timeout(self.settings.attempt_seconds):
                body = await self._reader.read(key, offset, length, priority=priority)
        except TimeoutError:
            seconds = self.settings.attempt_seconds
            raise Unavailable(f"{key} was not read within {seconds:g} seconds") from None
        count.bytes_fetched += len(body)
        if priority is Priority.DEMAND:
            self.demand_seconds += (clock() - begin - self.demand_seconds) / 8
        return body

    async def _land(
        self, key: str, get: Get, body: bytes, flights: Sequence[Flight], priority: Priority
    ) -> None:
        """Decodes and verifies some chunks of a body, wakes who waits, and writes them down."""
        wanted = [
            Wanted(i.location(f.ordinal), i.length(f.ordinal), f.digest, i.seals)
            for f in flights
            for i in (f.image,)
        ]
        found = await self.decode(body, get.offset, wanted)
        wrong: list[tuple[Flight, Wanted, Corrupt]] = []
        for flight, chunk, plaintext in zip(flights, wanted, found, strict=True):
            if isinstance(plaintext, Corrupt):
                wrong.append((flight, chunk, plaintext))
            else:
                flight.land(plaintext)
        for flight, chunk, fault in wrong:
            right = await self._read_again(key, chunk, fault, priority)
            if isinstance(right, bytes):
                flight.land(right)
            else:
                self._end(flight, right)
        kept: tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]] = ([], [])
        for flight in flights:
            if flight.plaintext is not None:
                ahead = flight.priority is not Priority.DEMAND
                kept[ahead].append((flight.digest, flight.plaintext))
        self.counters.by_class[priority].chunks += len(kept[0]) + len(kept[1])
        for ahead in (False, True):
            if kept[ahead]:
                await self.arena.admit(kept[ahead], ahead=ahead)
        for flight in flights:
            self._end(flight)

    async def decode(
        self, body: bytes, offset: int, wanted: Sequence[Wanted]
    ) -> list[bytes | Corrupt]:
        """The verified plaintext of each, or why not; on a thread where that is worth it."""
        if is_lone_raw(wanted):
            return decode_all(body, offset, wanted)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._cpu, decode_all, body, offset, wanted)

    async def _read_again(
        self, key: str, chunk: Wanted, fault: Corrupt, priority: Priority
    ) -> bytes | CubecacheError:
        """Asks once more for a chunk that came wrong, past any tier between us and the origin."""
        log.error("%s; asking the origin again", fault)
        self.counters.corrupt_bodies += 1
        self._reader.condemn(key)
        place = chunk.location
        try:
            body = await self._read(key, place.offset, place.stored_length, priority)
        except CubecacheError as failure:
            return failure
        (right,) = await self.decode(body, place.offset, (chunk,))
        if isinstance(right, bytes):
            self.counters.repaired += 1
        return right


def _groups(flights: Sequence[Flight]) -> Iterable[Sequence[Flight]]:
    """Flights in steps that are decoded together, those somebody waits for first."""
    left = sorted(flights, key=lambda flight: flight.priority)
    while left:
        # Somebody may have begun to wait meanwhile; what nobody waits for comes in larger steps.
        waited = left[0].priority is Priority.DEMAND
        count = _DECODED_AT_ONCE if waited else _DECODED_AHEAD
        yield left[:count]
        left = sorted(left[count:], key=lambda flight: flight.priority)
