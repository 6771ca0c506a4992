"""Small wrappers of one RangeReader each: metering and limits (retry and hedging have files).

Limits are per class. A class waits only for its own place and for those above it, so demand is
never queued behind fill; a window over all classes follows the store's wish to be left alone
(additive increase, multiplicative decrease).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping

from imagecache.errors import CubecacheError
from imagecache.store.base import Priority, RangeReader, Throttled
from imagecache.store.counters import ClassCounters

MIN_WINDOW = 4.0


class MeteredReader:
    """Counts every attempt that reaches it."""

    def __init__(self, inner: RangeReader, counters: tuple[ClassCounters, ...]) -> None:
        self._inner = inner
        self._counters = counters

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        """As the inner reader."""
        counters = self._counters[priority]
        counters.requests += 1
        started = time.perf_counter()
        try:
            body = await self._inner.read(key, offset, length, priority=priority)
        except CubecacheError as error:
            counters.errors += 1
            counters.throttled += isinstance(error, Throttled)
            raise
        finally:
            seconds = time.perf_counter() - started
            counters.seconds += seconds
            counters.times.add(seconds)
        counters.bytes += len(body)
        return body

    def condemn(self, key: str) -> None:
        """Passed on."""
        self._inner.condemn(key)

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()


class LimitedReader:
    """At most so many reads under way per class, and fewer while the store throttles."""

    def __init__(
        self,
        inner: RangeReader,
        places: Mapping[Priority, int],
        counters: tuple[ClassCounters, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner = inner
        self._places = tuple(places[priority] for priority in Priority)
        self._counters = counters
        self._clock = clock
        self._busy = [0] * len(Priority)
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = tuple(deque() for _ in Priority)
        self._full_window = float(sum(self._places))
        self._window = self._full_window
        self._halved_at = -1.0

    @property
    def window(self) -> float:
        """How many reads of all classes may be under way now."""
        return self._window

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        """As the inner reader, after a place of the class is free."""
        if self._admits(priority) and not self._waiting[priority]:
            self._busy[priority] += 1
        else:
            await self._wait(priority)
        started = self._clock()
        try:
            body = await self._inner.read(key, offset, length, priority=priority)
        except Throttled:
            # Answers to what was sent before the last halving say nothing new.
            if started > self._halved_at:
                self._halved_at = self._clock()
                self._window = max(MIN_WINDOW, self._window / 2)
            raise
        else:
            self._window = min(self._full_window, self._window + 1.0 / self._window)
            return body
        finally:
            self._busy[priority] -= 1
            self._wake()

    def condemn(self, key: str) -> None:
        """Passed on."""
        self._inner.condemn(key)

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()

    def _admits(self, priority: Priority) -> bool:
        if self._busy[priority] >= self._places[priority]:
            return False
        return sum(self._busy[: priority + 1]) < self._window

    async def _wait(self, priority: Priority) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[priority].append(place)
        started = time.perf_counter()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._busy[priority] -= 1  # woken and cancelled at once: hand the place on
            else:
                self._waiting[priority].remove(place)
            self._wake()
            raise
        finally:
            self._counters[priority].waited_seconds += time.perf_counter() - started

    def _wake(self) -> None:
        for priority in Priority:
            waiting = self._waiting[priority]
            while waiting and self._admits(priority):
                place = waiting.popleft()
                if not place.done():
                    self._busy[priority] += 1
                    place.set_result(None)
