"""Answers of server-sent events: bounded in number and age, ended when the daemon ends.

Format: WHATWG HTML, "Server-sent events": `event:` and `data:` lines, an empty line ends an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from imagecache.errors import Unavailable

MEDIA = "text/event-stream"
MAX_STREAMS = 32
WRITE_SECONDS = 10.0
BEAT_SECONDS = 15.0


class EventStream:
    """One answer; `send` while the client reads."""

    def __init__(self, answer: web.StreamResponse) -> None:
        self.answer = answer
        self._sent: dict[str, str] = {}
        self._last = time.monotonic()

    async def send(self, event: str, value: Any) -> None:
        """Sends an event, unless it says what the last one of its name said."""
        text = json.dumps(value, separators=(",", ":"))
        if self._sent.get(event) == text:
            if time.monotonic() - self._last > BEAT_SECONDS:
                await self._write(": still here\n\n")
            return
        self._sent[event] = text
        await self._write(f"event: {event}\ndata: {text}\n\n")

    async def _write(self, text: str) -> None:
        async with asyncio.timeout(WRITE_SECONDS):
            await self.answer.write(text.encode())
        self._last = time.monotonic()


class EventStreams:
    """All such answers of one daemon."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def count(self) -> int:
        """How many are open."""
        return len(self._tasks)

    @contextlib.asynccontextmanager
    async def begin(self, request: web.Request) -> AsyncIterator[EventStream]:
        """An answer that has begun; a client that goes ends it. Unavailable beyond MAX_STREAMS."""
        if len(self._tasks) >= MAX_STREAMS:
            raise Unavailable(f"{MAX_STREAMS} watchers are here already", remedy="poll instead")
        answer = web.StreamResponse(headers={"Content-Type": MEDIA, "X-Accel-Buffering": "no"})
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await answer.prepare(request)
            with contextlib.suppress(ConnectionError, TimeoutError):
                yield EventStream(answer)
                await answer.write_eof()
        finally:
            self._tasks.discard(task)

    async def end(self, _: web.Application) -> None:
        """Ends all of them; for the application's shutdown."""
        for task in tuple(self._tasks):
            task.cancel()


def wanted(request: web.Request) -> bool:
    """Whether a client asks for events where there is another answer too."""
    return any(MEDIA in value for value in request.headers.getall("Accept", []))
