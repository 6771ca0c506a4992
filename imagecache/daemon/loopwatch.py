"""How late the event loop is: everything that the daemon answers waits for it."""

from __future__ import annotations

import asyncio

from imagecache.buckets import Buckets

PERIOD_SECONDS = 0.1


class LoopWatch:
    """Sleeps and counts how much too late it wakes; runs until cancelled."""

    def __init__(self) -> None:
        self.late = Buckets()
        self.worst_seconds = 0.0

    async def run(self) -> None:
        """Counts ten times a second."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PERIOD_SECONDS
            await asyncio.sleep(PERIOD_SECONDS)
            late = max(0.0, loop.time() - due)
            self.late.add(late)
            self.worst_seconds = max(self.worst_seconds, late)
