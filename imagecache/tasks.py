"""A task group that raises the first error itself, so that typed errors keep their types."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

_T = TypeVar("_T")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """asyncio.TaskGroup, but of several failures the first leaves alone, without a group."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise first_error(failures) from failures


def first_error(error: BaseException) -> BaseException:
    """The first leaf of a tree of exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def finished(work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` returns, brought to its end even where the caller is cancelled meanwhile.

    For the ends of things that are over in a moment, as a killed process is: a group that aborts
    cancels whoever is in its `finally` too. The cancellation is raised afterwards.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
