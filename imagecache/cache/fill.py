"""Filling: the rest of an image flows in behind demand, by few large reads, at a set rate."""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from imagecache.cache.arena import Arena
from imagecache.cache.fetch import Fetcher
from imagecache.cache.image import ImageMap
from imagecache.cache.plan import MAX_CHUNKS
from imagecache.errors import Unavailable
from imagecache.store.base import Priority

log = logging.getLogger(__name__)

_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 30.0
_LEASED_SHARE = 0.75  # of the arena, that all filled images together may hold for themselves


class FillMode(StrEnum):
    """How much of an image is brought before anybody reads it."""

    WHOLE = "whole"
    HOT = "hot"
    NONE = "none"


class FillState(StrEnum):
    """Where a fill is."""

    IDLE = "idle"
    RUNNING = "running"
    WAITING = "waiting"  # the store does not answer; it will be asked again
    DONE = "done"
    FULL = "full"  # the arena takes no more
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class FillProgress:
    """What of the wanted chunks is here; bytes are stored bytes."""

    mode: FillMode
    state: FillState
    chunks: int
    chunks_total: int
    bytes: int
    bytes_total: int
    failed: int  # chunks that the store has not, or has wrong
    error: str | None


def default_mode(image: ImageMap, arena: Arena) -> FillMode:
    """Whole where the image fits the cache's budget, else hot."""
    fits = image.chunk_bytes <= arena.settings.budget_bytes * _LEASED_SHARE
    return FillMode.WHOLE if fits else FillMode.HOT


class Fill:
    """One image's fill. A whole one keeps what it brings from eviction until it is stopped.

    `hot` are chunk ordinals in the order in which they are likely to be read; without any, the
    metadata region counts as hot. They come first in either mode.
    """

    def __init__(
        self,
        image: ImageMap,
        fetcher: Fetcher,
        *,
        mode: FillMode,
        hot: Sequence[int] = (),
        bytes_per_second: int = 0,
    ) -> None:
        """`bytes_per_second` of stored bytes, 0 for no limit."""
        self._image = image
        self._fetcher = fetcher
        self._mode = mode
        self._rate = bytes_per_second
        self._shared = image.shared_fill
        self._holds = False
        self._task: asyncio.Task[None] | None = None
        self._state = FillState.IDLE
        self._error: str | None = None
        self._followed: Fill | None = None
        self._order = self._plan(hot)
        self._bytes_total = sum(map(image.stored_length, self._order))
        self._chunks = self._bytes = self._failed = 0

    def _plan(self, hot: Sequence[int]) -> Sequence[int]:
        if self._mode is FillMode.NONE:
            return ()
        usual = self._mode is FillMode.WHOLE and not hot
        if usual and self._shared.order is not None:
            return self._shared.order
        first = list(hot) or self._image.ordinals_in(0, self._image.metadata_bytes)
        if self._mode is FillMode.WHOLE:
            first += self._image.pack_order()
        order = array("I", dict.fromkeys(first))
        if usual:
            self._shared.order = order
        return order

    @property
    def progress(self) -> FillProgress:
        """The counts of this moment; of the fill that brings it all for this one, if one does."""
        who = self._followed or self
        return FillProgress(
            mode=self._mode,
            state=who._state,
            chunks=who._chunks,
            chunks_total=len(self._order),
            bytes=who._bytes,
            bytes_total=self._bytes_total,
            failed=who._failed,
            error=who._error,
        )

    def start(self) -> None:
        """Begins in the background; safe to call twice."""
        if self._task is None:
            self._state = FillState.RUNNING
            self._hold()
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def wait(self) -> FillProgress:
        """Returns when it has ended, one way or another."""
        if self._task is not None:
            await asyncio.wait({self._task})
        return self.progress

    async def stop(self) -> None:
        """Ends it and lets go of what it held; what is on its way arrives by itself."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
            self._state = FillState.STOPPED
        if self._holds:
            self._holds = False
            self._shared.let_go()

    def _hold(self) -> None:
        if self._mode is FillMode.WHOLE:
            self._holds = self._shared.hold(self._image, self._fetcher.arena, _LEASED_SHARE)

    async def _follow(self) -> bool:
        """Leaves it to another fill of this image to bring it all; False where that one did not."""
        shared = self._shared
        while isinstance(leader := shared.leader, Fill) and leader._task is not None:
            self._followed = leader
            await asyncio.wait({leader._task})
            self._followed = None
            if leader._state is FillState.DONE and not leader._failed:
                self._chunks, self._bytes = leader._chunks, leader._bytes
                self._state = FillState.DONE
                return True
            if shared.leader is leader:
                shared.leader = None
        shared.leader = self
        return False

    async def _run(self) -> None:
        if self._holds and await self._follow():
            return
        pending = self._order
        pause = _FIRST_RETRY_SECONDS
        while pending:
            left = await self._pass(pending)
            if self._state is FillState.FULL or not left:
                break
            if len(left) < len(pending):
                pause = _FIRST_RETRY_SECONDS
            pending = left
            self._state = FillState.WAITING
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_RETRY_SECONDS)
            self._state = FillState.RUNNING
        if self._state is not FillState.FULL:
            self._state = FillState.DONE

    async def _pass(self, pending: Sequence[int]) -> Sequence[int]:
        """Asks once for everything; the chunks to ask for again, as the store was not there."""
        loop = asyncio.get_running_loop()
        left: list[int] = []
        steps = self._steps(pending)
        # Two steps under way keep the line busy while the first is decoded.
        under_way: list[asyncio.Task[list[int]]] = []
        next_at = loop.time()
        try:
            for step in steps:
                if self._rate:
                    await asyncio.sleep(max(0.0, next_at - loop.time()))
                    cost = sum(map(self._image.stored_length, step)) / self._rate
                    next_at = max(next_at, loop.time()) + cost
                under_way.append(loop.create_task(self._bring(step)))
                if len(under_way) > self._fetcher.settings.fill_gets:
                    left += await under_way.pop(0)
                if left or self._state is FillState.FULL:
                    break
            while under_way:
                left += await under_way.pop(0)
        finally:
            for task in under_way:
                task.cancel()
        if self._state is FillState.FULL:
            return []
        return left + [n for step in steps for n in step]

    async def _bring(self, step: Sequence[int]) -> list[int]:
        image, arena = self._image, self._fetcher.arena
        if self._mode is FillMode.WHOLE and not self._holds and arena.is_full:
            # Without a right to stay, the last chunks would push out the first.
            self._state = FillState.FULL
            return []
        here = [n for n in step if arena.holds(image.digest(n))]
        for ordinal in here:
            self._arrived(ordinal)
        missing = [n for n in step if not arena.holds(image.digest(n))]
        wanted = self._fetcher.request(image, missing, Priority.FILL)
        flights = {flight.digest: flight for flight, _ in wanted}
        await self._fetcher.wait_kept(flights.values())
        left: list[int] = []
        for ordinal in missing:
            digest = image.digest(ordinal)
            flight = flights.get(digest)
            error = flight.error if flight else None
            if arena.holds(digest):
                self._arrived(ordinal)
            elif error is None and flight is not None and not arena.degraded:
                self._state = FillState.FULL
            elif error is None or isinstance(error, Unavailable):
                left.append(ordinal)
            else:
                self._failed += 1
            self._error = str(error) if error else arena.degraded
        return left

    def _arrived(self, ordinal: int) -> None:
        self._chunks += 1
        self._bytes += self._image.stored_length(ordinal)

    def _steps(self, pending: Sequence[int]) -> Iterator[list[int]]:
        """The chunks in steps of about one large read."""
        step: list[int] = []
        size = 0
        for ordinal in pending:
            length = self._image.stored_length(ordinal)
            full = size + length > self._fetcher.settings.max_get_bytes or len(step) == MAX_CHUNKS
            if step and full:
                yield step
                step, size = [], 0
            step.append(ordinal)
            size += length
        if step:
            yield step
