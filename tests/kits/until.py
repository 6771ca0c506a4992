"""Waiting in tests: for a condition, or for an answer, but never for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_SECONDS = 90.0
"""Long enough for a machine that is busy with other things; a test never measures by it."""


async def until(
    condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS
) -> None:
    """Returns when a condition holds; fails, saying what did not come, at the deadline."""
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    while not condition():
        assert clock() < end, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(0.002)


async def soon(awaitable: Awaitable[T], seconds: float = PATIENCE_SECONDS) -> T:
    """What an awaitable gives, within the deadline."""
    return await asyncio.wait_for(awaitable, seconds)
