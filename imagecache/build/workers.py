"""Running worker processes: a deadline, a memory limit, events in order, typed errors back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import Any

from imagecache.errors import CubecacheError, LimitExceeded, Rejected, Unavailable, from_record
from imagecache.tasks import finished

_EVENT_LIMIT = 1 << 20
niceness: ContextVar[int] = ContextVar("niceness", default=0)
"""How much worker processes give way to others; a daemon's give way to the reads it answers."""


class Worker:
    """One worker process for the jobs of one build, one after another.

    A job that fails, or that nobody waits for any more, takes the process with it; the next job
    starts another one.
    """

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._noise: asyncio.Task[str] | None = None

    @property
    def pid(self) -> int:
        """The process's id, 0 where none runs."""
        return self._process.pid if self._process is not None else 0

    async def start(self) -> None:
        """Starts the process ahead of its first job, so that its imports cost no time then."""
        if self._process is not None:
            return
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "imagecache.build.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_EVENT_LIMIT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        if niceness.get():
            with contextlib.suppress(OSError):  # ended already, which its first job will tell
                os.setpriority(os.PRIO_PROCESS, self._process.pid, niceness.get())
        self._noise = asyncio.create_task(_tail(self._process.stderr))

    async def run(
        self, job: dict[str, Any], *, deadline_seconds: float
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one job, the last being "done".

        Raises the worker's own typed error, LimitExceeded past the deadline, and Rejected when the
        process died without a word (a parser that was killed parsed something hostile).
        """
        await self.start()
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise Unavailable("a worker process has no pipes")
        try:
            async with asyncio.timeout(deadline_seconds):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    process.stdin.write(json.dumps(job).encode() + b"\n")
                    await process.stdin.drain()
                async for line in process.stdout:
                    event = json.loads(line)
                    if event["event"] == "error":
                        raise from_record(event)
                    if event["event"] == "done":
                        process = None
                        yield event
                        return
                    yield event
                await process.wait()
        except TimeoutError as error:
            raise LimitExceeded(
                f"a worker's job took longer than {deadline_seconds:.0f} seconds",
                remedy="raise [build] deadline_seconds if the image is honest",
            ) from error
        finally:
            noise = await self.close() if process is not None else ""
        if process.returncode is not None and process.returncode > 0:
            # It ended by itself, with a traceback: our mistake, not the layer's.
            last = noise.rpartition("\n")[2][-200:]
            raise CubecacheError(f"internal error in a worker process: {last}")
        raise Rejected(
            f"a worker process was killed by signal {-(process.returncode or 0)}",
            remedy="the layer may be hostile; if the host killed it, free memory",
        )

    async def close(self) -> str:
        """Ends the process, whatever it does; the end of what it wrote to stderr."""
        process, noise = self._process, self._noise
        self._process = self._noise = None
        if process is None or noise is None:
            return ""
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return await finished(_ended(process, noise))


async def _ended(process: asyncio.subprocess.Process, noise: asyncio.Task[str]) -> str:
    await process.wait()
    return await noise


async def _tail(stream: asyncio.StreamReader | None) -> str:
    kept = b""
    if stream is not None:
        while piece := await stream.read(65536):
            kept = (kept + piece)[-4096:]
    return kept.decode(errors="replace").strip()
