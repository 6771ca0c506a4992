"""What watches the daemon while it runs: the loop's lateness, its answers' times, the realm."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator

from aiohttp import web

from imagecache.buckets import Buckets
from imagecache.daemon.eventstream import EventStreams
from imagecache.daemon.loopwatch import LoopWatch
from imagecache.daemon.realmview import RealmView
from imagecache.daemon.service import Service


class Timings:
    """How long the control API's answers took, by operation."""

    def __init__(self) -> None:
        self.by_operation: defaultdict[str, Buckets] = defaultdict(Buckets)

    @contextlib.contextmanager
    def of(self, operation: str) -> Iterator[None]:
        """Times one answer, whatever it is."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.by_operation[operation].add(time.perf_counter() - began)


class Watched:
    """Of one application; `run` is its cleanup context."""

    def __init__(self, service: Service) -> None:
        self.streams = EventStreams()
        self.timings = Timings()
        self.loop = LoopWatch()
        self.realm = RealmView(service.catalog)

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Watches until the application ends."""
        task = asyncio.create_task(self.loop.run(), name="loop watch")
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.realm.close()
