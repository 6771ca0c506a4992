"""How a collection does many small store calls: in parallel, or one by one for a simulator."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from imagecache.tasks import task_group

A = TypeVar("A")
B = TypeVar("B")
PLACES = 16


class ForEach(Protocol):
    """Calls an asynchronous function on each item; the answers in the order of the items."""

    async def __call__(self, call: Callable[[A], Awaitable[B]], items: Iterable[A], /) -> list[B]:
        """Raises the first error."""
        ...


async def one_by_one(call: Callable[[A], Awaitable[B]], items: Iterable[A], /) -> list[B]:
    """Each after the one before it."""
    return [await call(item) for item in items]


async def in_parallel(call: Callable[[A], Awaitable[B]], items: Iterable[A], /) -> list[B]:
    """At most `PLACES` at a time."""
    places = asyncio.Semaphore(PLACES)

    async def within(item: A) -> B:
        async with places:
            return await call(item)

    chosen: Sequence[A] = list(items)
    async with task_group() as group:
        tasks = [group.create_task(within(item)) for item in chosen]
    return [task.result() for task in tasks]
