"""Retry wrappers: for ranges with a deadline per class, for the control plane with a policy."""

from __future__ import annotations

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from imagecache.errors import CubecacheError, NotFound, Unavailable
from imagecache.store.base import ObjectStat, Priority, RangePastEnd, RangeReader, Store
from imagecache.store.counters import ClassCounters
from imagecache.store.policy import RetryBudget, RetryPolicy, retryable

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]

_OWN_WRITES = 4096
_OWN_WRITE_S = 30.0
_COMPARE_BYTES = 1 << 20


class RetryReader:
    """Tries a read again while its class's deadline, the policy and the budget allow it."""

    def __init__(
        self,
        inner: RangeReader,
        policy: RetryPolicy,
        deadlines_s: Mapping[Priority, float],
        counters: tuple[ClassCounters, ...],
        *,
        budget: RetryBudget | None = None,
        dice: random.Random | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._inner = inner
        self._policy = policy
        self._deadlines_s = tuple(deadlines_s[priority] for priority in Priority)
        self._counters = counters
        self._budget = budget or RetryBudget()
        self._dice = dice or random.Random()
        self._sleep = sleep

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        """As the inner reader; Unavailable when the deadline passes first."""
        deadline_s = self._deadlines_s[priority]
        loop = asyncio.get_running_loop()
        ends = loop.time() + deadline_s
        last: CubecacheError | None = None
        attempt = 0
        self._budget.earn()
        try:
            async with asyncio.timeout_at(ends):
                while True:
                    attempt += 1
                    try:
                        return await self._inner.read(key, offset, length, priority=priority)
                    except CubecacheError as error:
                        last = error
                        if not self._again(error, attempt):
                            raise
                    delay_s = self._policy.delay_s(attempt, last, self._dice)
                    if loop.time() + delay_s >= ends:
                        raise last
                    self._counters[priority].retries += 1
                    await self._sleep(delay_s)
        except TimeoutError:
            raise Unavailable(
                f"range {offset}+{length} of {key} did not arrive within {deadline_s:g} s",
                remedy=str(last) if last else None,
            ) from last

    def _again(self, error: CubecacheError, attempt: int) -> bool:
        if isinstance(error, NotFound | RangePastEnd):
            # Both are final from a store in order, and passing from one that lags or lies.
            return attempt < self._policy.not_found_attempts and self._budget.spend()
        return retryable(error) and attempt < self._policy.attempts and self._budget.spend()

    def condemn(self, key: str) -> None:
        """Passed on."""
        self._inner.condemn(key)

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()


class RetryStore:
    """Tries control-plane calls again; listings retry their pages inside the store itself.

    A 404 for a key that this process has just written is retried too: stores may lag behind.
    """

    def __init__(
        self,
        inner: Store,
        policy: RetryPolicy,
        *,
        dice: random.Random | None = None,
        sleep: Sleep = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner = inner
        self._policy = policy
        self._dice = dice or random.Random()
        self._sleep = sleep
        self._clock = clock
        self._own_writes: OrderedDict[str, float] = OrderedDict()

    async def get(self, key: str, *, limit: int) -> bytes:
        """As the inner store."""
        return await self._retried(key, lambda: self._inner.get(key, limit=limit))

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """As the inner store; True as well where a lost answer hid that we had written it.

        So a claim's body must differ from every other claimant's.
        """
        failures = 0

        async def attempt() -> bool:
            nonlocal failures
            try:
                return await self._inner.put(key, body, only_if_absent=only_if_absent)
            except Unavailable:
                failures += 1
                raise

        written = await self._retried(key, attempt)
        if not written and failures and isinstance(body, bytes) and len(body) <= _COMPARE_BYTES:
            stored = await self._retried(key, lambda: self._inner.stat(key))
            if stored.size == len(body):
                written = await self.get(key, limit=len(body)) == body
        self._own_writes[key] = self._clock()
        self._own_writes.move_to_end(key)
        if len(self._own_writes) > _OWN_WRITES:
            self._own_writes.popitem(last=False)
        return written

    async def stat(self, key: str) -> ObjectStat:
        """As the inner store."""
        return await self._retried(key, lambda: self._inner.stat(key))

    def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """Passed on."""
        return self._inner.list(prefix)

    async def delete(self, key: str) -> None:
        """As the inner store."""
        self._own_writes.pop(key, None)
        await self._retried(key, lambda: self._inner.delete(key))

    async def claims_are_atomic(self) -> bool:
        """As the inner store."""
        return await self._retried("", self._inner.claims_are_atomic)

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()

    async def _retried(self, key: str, call: Callable[[], Awaitable[T]]) -> T:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await call()
            except CubecacheError as error:
                lagging = isinstance(error, NotFound) and self._just_written(key)
                if not (lagging or retryable(error)) or attempt >= self._policy.attempts:
                    raise
                delay_s = self._policy.delay_s(attempt, error, self._dice)
            await self._sleep(delay_s)

    def _just_written(self, key: str) -> bool:
        at = self._own_writes.get(key)
        return at is not None and self._clock() - at < _OWN_WRITE_S
