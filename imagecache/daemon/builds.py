"""What the daemon's preload jobs came to, counted as they end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from imagecache.build.progress import BuildResult, Report
from imagecache.build.workers import niceness
from imagecache.errors import CubecacheError
from imagecache.logcontext import about
from preload.jobs import Job

NICENESS = 10
Build = Callable[[Job, Report], Awaitable[BuildResult]]


@dataclass(slots=True)
class Builds:
    """Plain counts since the daemon began; a build that found its image there is `found`."""

    built: int = 0
    found: int = 0
    failed: int = 0
    stopped: int = 0
    downloaded_bytes: int = 0
    stored_bytes: int = 0
    chunks: int = 0  # of images that were built
    new_chunks: int = 0
    seconds: float = 0.0  # of those that were built

    def counted(self, build: Build) -> Build:
        """The build, counted, its log lines marked with the job."""

        async def counting(job: Job, report: Report) -> BuildResult:
            niceness.set(NICENESS)
            with about(job=job.identity, owner=job.owner):
                try:
                    result = await build(job, report)
                except CubecacheError:
                    self.failed += 1
                    raise
                except asyncio.CancelledError:
                    self.stopped += 1
                    raise
            self._note(result)
            return result

        return counting

    def _note(self, result: BuildResult) -> None:
        if not result.new_layers and not result.stored_bytes:
            self.found += 1
            return
        self.built += 1
        self.downloaded_bytes += result.downloaded_bytes
        self.stored_bytes += result.stored_bytes
        self.chunks += result.chunks
        self.new_chunks += result.new_chunks
        self.seconds += result.seconds
