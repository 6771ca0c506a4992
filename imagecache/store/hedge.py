"""Hedged reads: when a demand read is slower than the running p95, ask once more beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from imagecache.errors import CubecacheError
from imagecache.store.base import Priority, RangeReader
from imagecache.store.counters import ClassCounters

_SAMPLES = 256
_MIN_SAMPLES = 32
_MIN_DELAY_S = 0.005  # below this a hedge is the same queue again


class Latencies:
    """The running p95 of the last 256 reads of about one size, in seconds."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._next = 0
        self.p95_s: float | None = None

    def add(self, seconds: float) -> None:
        """One more read; the p95 is worked out at every 32nd."""
        if len(self._samples) < _SAMPLES:
            self._samples.append(seconds)
        else:
            self._samples[self._next % _SAMPLES] = seconds
        self._next += 1
        if self._next % _MIN_SAMPLES == 0:
            ordered = sorted(self._samples)
            self.p95_s = ordered[int(len(ordered) * 0.95)]


class HedgedReader:
    """Sends at most `share` extra reads; the first good answer wins, the other is cancelled.

    Latencies are kept by size (powers of four). A saved-up budget of `burst` hedges bounds what an
    outage can cost. Only demand is hedged: nobody waits for the rest.
    """

    def __init__(
        self,
        inner: RangeReader,
        counters: tuple[ClassCounters, ...],
        *,
        share: float = 0.05,
        burst: float = 8.0,
    ) -> None:
        self._inner = inner
        self._counters = counters
        self._share = share
        self._burst = burst
        self._tokens = 0.0
        self._latencies: dict[int, Latencies] = {}

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        """As the inner reader."""
        if priority is not Priority.DEMAND:
            return await self._inner.read(key, offset, length, priority=priority)
        self._tokens = min(self._burst, self._tokens + self._share)
        latencies = self._latencies.setdefault(length.bit_length() >> 1, Latencies())
        loop = asyncio.get_running_loop()
        started = loop.time()

        def again() -> Awaitable[bytes]:
            return self._inner.read(key, offset, length, priority=priority)

        if latencies.p95_s is None:
            body = await again()
        else:
            body = await self._race(again, max(_MIN_DELAY_S, latencies.p95_s))
        latencies.add(loop.time() - started)
        return body

    def condemn(self, key: str) -> None:
        """Passed on."""
        self._inner.condemn(key)

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()

    async def _race(self, again: Callable[[], Awaitable[bytes]], delay_s: float) -> bytes:
        """The first read runs in the caller's task: no task is made unless the timer fires."""
        counters = self._counters[Priority.DEMAND]
        loop = asyncio.get_running_loop()
        hedge: asyncio.Task[bytes] | None = None
        first_done = False

        async def ask() -> bytes:
            return await again()

        def start() -> None:
            nonlocal hedge
            if self._tokens < 1.0 or first_done:
                return
            self._tokens -= 1.0
            counters.hedges += 1
            hedge = loop.create_task(ask())
            hedge.add_done_callback(ended)

        def ended(task: asyncio.Task[bytes]) -> None:
            if not task.cancelled() and task.exception() is None and not first_done:
                scope.reschedule(loop.time())  # interrupts the first read

        timer = loop.call_later(delay_s, start)
        try:
            async with asyncio.timeout(None) as scope:
                try:
                    return await again()
                finally:
                    first_done = True
        except TimeoutError:
            if hedge is None or not hedge.done() or not scope.expired():
                raise
            counters.hedges_won += 1
            return hedge.result()
        except CubecacheError:
            if hedge is None or hedge.done():
                raise
            body = await hedge  # the first failed; its twin may not
            counters.hedges_won += 1
            return body
        finally:
            timer.cancel()
            if hedge is not None and not hedge.done():
                hedge.cancel()
                await asyncio.gather(hedge, return_exceptions=True)
