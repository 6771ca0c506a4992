"""The shared HTTP tier in front of the origin: used while it is good, never needed."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from yarl import URL

from imagecache.errors import CubecacheError, NotFound
from imagecache.store.base import Priority, RangeReader
from imagecache.store.counters import ReadCounters
from imagecache.store.rangeclient import Refusal, UrlSource

_CONDEMNED_KEYS = 4096
_CONDEMNED_S = 600.0
_MAX_REST_S = 60.0


class TierUrls:
    """URLs of the tier: the origin's path and query at its host, so it needs no credentials.

    The cache asks the origin with the origin's Host, and leaves the query out of its cache key.
    """

    def __init__(self, base: URL, origin: UrlSource) -> None:
        self._base = base
        self._origin = origin

    def known(self, key: str) -> URL | None:
        """As the origin's, moved to the tier."""
        url = self._origin.known(key)
        return None if url is None else self._moved(url)

    async def find(self, key: str) -> URL:
        """As the origin's, moved to the tier."""
        return self._moved(await self._origin.find(key))

    async def refused(self, key: str, refusal: Refusal) -> bool:  # noqa: ARG002 - the protocol's arguments; a tier's refusal says nothing of the signature
        """False: the origin is asked instead, and knows better."""
        return False

    def _moved(self, url: URL) -> URL:
        path = self._base.raw_path.rstrip("/") + url.raw_path
        query = f"?{url.raw_query_string}" if url.raw_query_string else ""
        return URL(f"{self._base.origin()}{path}{query}", encoded=True)


class TieredReader:
    """Asks the tier first, within `patience_s`; anything but the bytes is a fall-back.

    After `tolerance` failures in a row the tier rests for a second, doubling up to a minute; one
    read then tries it. Wrong bytes (`condemn`) count as failures, and their key goes to the origin
    for ten minutes.
    """

    def __init__(
        self,
        tier: RangeReader,
        origin: RangeReader,
        counters: ReadCounters,
        *,
        patience_s: float = 1.0,
        tolerance: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tier = tier
        self._origin = origin
        self._counters = counters
        self._patience_s = patience_s
        self._tolerance = tolerance
        self._clock = clock
        self._failures = 0
        self._rests_until = 0.0
        self._rest_s = 1.0
        self._condemned: OrderedDict[str, float] = OrderedDict()

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        """From the tier, else from the origin; raises what the origin raises."""
        if self._usable(key):
            try:
                async with asyncio.timeout(self._patience_s):
                    body = await self._tier.read(key, offset, length, priority=priority)
            except NotFound:
                pass  # it may not know the object: no failure of its own
            except (CubecacheError, TimeoutError):
                self._failed()
            else:
                if self._failures:
                    self._failures -= 1
                else:
                    self._rest_s = 1.0
                return body
            self._counters.tier_fallbacks += 1
        return await self._origin.read(key, offset, length, priority=priority)

    def condemn(self, key: str) -> None:
        """The tier may have sent wrong bytes of `key`."""
        self._counters.condemned += 1
        if key not in self._condemned:
            self._failed()
        self._condemned[key] = self._clock() + _CONDEMNED_S
        self._condemned.move_to_end(key)
        if len(self._condemned) > _CONDEMNED_KEYS:
            self._condemned.popitem(last=False)
        self._origin.condemn(key)

    async def close(self) -> None:
        """Close both."""
        await self._tier.close()
        await self._origin.close()

    def _usable(self, key: str) -> bool:
        now = self._clock()
        until = self._condemned.get(key)
        if until is not None:
            if now < until:
                return False
            del self._condemned[key]
        if self._failures < self._tolerance:
            return True
        if now < self._rests_until:
            return False
        self._rest()  # this read tries it; the others wait for its verdict
        return True

    def _failed(self) -> None:
        self._failures += 1
        if self._failures >= self._tolerance:
            self._failures = self._tolerance
            self._rest()

    def _rest(self) -> None:
        now = self._clock()
        if now >= self._rests_until:
            self._rests_until = now + self._rest_s
            self._rest_s = min(_MAX_REST_S, self._rest_s * 2)
