"""A flight: one chunk on its way, however many wait for it."""

from __future__ import annotations

import asyncio
from enum import IntEnum
from typing import Protocol

from imagecache.cache.image import ImageMap
from imagecache.errors import CubecacheError
from imagecache.store.base import Priority


class Stage(IntEnum):
    """Where a flight is; it only moves forward, and always ends in LANDED or FAILED."""

    CHECKING = 0  # a local copy is compared with its digest
    QUEUED = 1
    FETCHING = 2
    LANDED = 3  # verified; the arena may still be writing it down
    FAILED = 4


class Carrier(Protocol):
    """A stream that brings many flights one after another."""

    def is_far(self, flight: Flight) -> bool:
        """Whether an own GET would bring this flight sooner."""
        ...

    def overtaken(self, flight: Flight) -> None:
        """An own GET was sent."""
        ...


class Flight:
    """One chunk on its way. It belongs to the fetcher and outlives whoever asked first.

    `done` is set in the end, without an exception; then either `plaintext` (verified) or `error`
    is there. `over` is set later, when the arena has taken it or not. `priority` is the highest of
    those who asked. `rotten`: a local copy was refused. `stream` carries it while that is so.
    """

    __slots__ = (
        "digest",
        "done",
        "error",
        "image",
        "ordinal",
        "over",
        "plaintext",
        "priority",
        "rotten",
        "stage",
        "stream",
    )

    def __init__(self, image: ImageMap, ordinal: int, digest: bytes, priority: Priority) -> None:
        self.image = image
        self.ordinal = ordinal
        self.digest = digest
        self.priority = priority
        self.stage = Stage.QUEUED
        self.plaintext: bytes | None = None
        self.error: CubecacheError | None = None
        self.rotten = False
        self.stream: Carrier | None = None
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()

    def land(self, plaintext: bytes) -> None:
        """The chunk is verified: everybody who waits may have it."""
        if self.stage < Stage.LANDED:
            self.stage = Stage.LANDED
            self.plaintext = plaintext
            self.done.set_result(None)

    def fail(self, error: CubecacheError) -> None:
        """The chunk will not come by this flight."""
        if self.stage < Stage.LANDED:
            self.stage = Stage.FAILED
            self.error = error
            self.done.set_result(None)

    def end(self) -> None:
        """Nothing more happens to this flight."""
        if not self.over.done():
            self.over.set_result(None)
