"""Running worker processes: a deadline, a memory limit, events in order, typed errors back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from imagecache.errors import LimitExceeded, Rejected, Unavailable, from_record

_EVENT_LIMIT = 1 << 20


async def run_worker(
    job: dict[str, Any], *, deadline_seconds: float
) -> AsyncIterator[dict[str, Any]]:
    """The events of one job, the last being "done".

    Raises the worker's own typed error, LimitExceeded past the deadline, and Rejected when the
    process died without a word (a parser that was killed parsed something hostile).
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "imagecache.build.worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_EVENT_LIMIT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    stderr = asyncio.create_task(_tail(process.stderr))
    try:
        async with asyncio.timeout(deadline_seconds):
            await _feed(process, job)
            async for event in _events(process):
                if event["event"] == "error":
                    raise from_record(event)
                yield event
                if event["event"] == "done":
                    return
            await process.wait()
    except TimeoutError as error:
        raise LimitExceeded(
            f"a worker's job took longer than {deadline_seconds:.0f} seconds",
            remedy="raise [build] deadline_seconds if the image is honest",
        ) from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        noise = await stderr
    raise Rejected(
        f"a worker process died with status {process.returncode}: {noise[-400:]!r}",
        remedy="the layer may be hostile; if the host killed it, free memory",
    )


async def _feed(process: asyncio.subprocess.Process, job: dict[str, Any]) -> None:
    if process.stdin is None:
        raise Unavailable("a worker process has no stdin")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(json.dumps(job).encode())
        await process.stdin.drain()
        process.stdin.close()


async def _events(process: asyncio.subprocess.Process) -> AsyncIterator[dict[str, Any]]:
    if process.stdout is None:
        raise Unavailable("a worker process has no stdout")
    async for line in process.stdout:
        yield json.loads(line)


async def _tail(stream: asyncio.StreamReader | None) -> str:
    kept = b""
    if stream is not None:
        while piece := await stream.read(65536):
            kept = (kept + piece)[-4096:]
    return kept.decode(errors="replace").strip()
