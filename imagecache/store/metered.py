"""Counts control calls, one wrapper for every store; it stands inside the retries."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from imagecache.errors import Busy, CubecacheError, NotFound
from imagecache.store.base import ObjectStat, Store, Throttled
from imagecache.store.counters import CallCounters


class MeteredStore:
    """Counts every attempt that reaches it, by call."""

    def __init__(self, inner: Store, counters: dict[str, CallCounters]) -> None:
        """`counters` has an entry for each of get, put, stat, list and delete."""
        self._inner = inner
        self._counters = counters

    async def get(self, key: str, *, limit: int) -> bytes:
        """As the inner store."""
        with self._counted("get") as counters:
            body = await self._inner.get(key, limit=limit)
            counters.bytes += len(body)
            return body

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """As the inner store; the bytes of a file are counted by who makes packs."""
        with self._counted("put") as counters:
            written = await self._inner.put(key, body, only_if_absent=only_if_absent)
            counters.bytes += len(body) if written and isinstance(body, bytes) else 0
            return written

    async def stat(self, key: str) -> ObjectStat:
        """As the inner store."""
        with self._counted("stat"):
            return await self._inner.stat(key)

    async def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """As the inner store; one call, however many pages it takes."""
        counters = self._counters["list"]
        counters.requests += 1
        begin = time.perf_counter()
        try:
            async for stat in self._inner.list(prefix):
                yield stat
        except CubecacheError as error:
            self._failed(counters, error)
            raise
        finally:
            counters.times.add(time.perf_counter() - begin)

    async def delete(self, key: str) -> None:
        """As the inner store."""
        with self._counted("delete"):
            await self._inner.delete(key)

    async def claims_are_atomic(self) -> bool:
        """As the inner store."""
        return await self._inner.claims_are_atomic()

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()

    @contextmanager
    def _counted(self, call: str) -> Iterator[CallCounters]:
        counters = self._counters[call]
        counters.requests += 1
        begin = time.perf_counter()
        try:
            yield counters
        except CubecacheError as error:
            self._failed(counters, error)
            raise
        finally:
            counters.times.add(time.perf_counter() - begin)

    @staticmethod
    def _failed(counters: CallCounters, error: CubecacheError) -> None:
        if not isinstance(error, NotFound | Busy):  # an answer, and often the wanted one
            counters.errors += 1
            counters.throttled += isinstance(error, Throttled)
