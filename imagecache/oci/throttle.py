"""A bound of bytes a second that several downloads share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Throttle:
    """Waits so that what is taken stays below a rate, and below that of `above`.

    The rate is asked for each time; 0 is no bound. Used on one event loop.
    """

    def __init__(
        self, bytes_per_second: Callable[[], int], *, above: Throttle | None = None
    ) -> None:
        self._rate = bytes_per_second
        self._above = above
        self._next_at = 0.0

    @property
    def rate(self) -> int:
        """Bytes a second that are allowed now, by all bounds; 0 for none."""
        rates = [self._rate(), 0 if self._above is None else self._above.rate]
        return min((rate for rate in rates if rate > 0), default=0)

    async def take(self, count: int) -> float:
        """Returns when `count` more bytes may be asked for; the seconds that it waited."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        rate = self._rate()
        if rate > 0:
            self._next_at = max(self._next_at, began) + count / rate
            await asyncio.sleep(self._next_at - count / rate - began)
        if self._above is not None:
            await self._above.take(count)
        return loop.time() - began

    def seconds_for(self, count: int) -> float:
        """At least so long takes a download of `count` bytes by itself."""
        rate = self._rate()
        own = count / rate if rate > 0 else 0.0
        return max(own, self._above.seconds_for(count) if self._above is not None else 0.0)
