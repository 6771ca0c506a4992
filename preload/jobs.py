"""Preload jobs: a bounded queue, one build at a time, one job for equal requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import uuid4

from imagecache.build.progress import BuildResult, Progress, Report
from imagecache.composition import ImageRequest
from imagecache.errors import Busy, CubecacheError, NotFound, as_record

logger = logging.getLogger(__name__)

MAX_QUEUED = 1000
MAX_KEPT = 200

Build = Callable[[ImageRequest, Report], Awaitable[BuildResult]]


class QueueFull(Busy):
    """Too many jobs wait; ask again after `retry_seconds`."""

    def __init__(self, message: str, *, retry_seconds: float = 30) -> None:
        super().__init__(message, remedy=f"try again in {retry_seconds:.0f} seconds")
        self.retry_seconds = retry_seconds


class JobState(StrEnum):
    """Where a job stands; the last three are ends."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False, slots=True)
class Job:
    """One image's preload; `version` rises with every change, `changed` wakes who watches."""

    identity: str
    request: ImageRequest
    owner: str = ""
    state: JobState = JobState.QUEUED
    progress: Progress | None = None
    result: BuildResult | None = None
    error: CubecacheError | None = None
    version: int = 0
    started: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)

    def touch(self) -> None:
        """Marks a change and wakes every watcher."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()

    async def watch(self, seen: int, seconds: float) -> None:
        """Returns when the version is beyond `seen`, or after `seconds`."""
        if self.version > seen or self.ended:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.changed.wait()

    def as_json(self) -> dict[str, Any]:
        """What the API answers of a job."""
        progress = self.progress
        return {
            "id": self.identity,
            "image": self.request.reference,
            "state": self.state.value,
            "version": self.version,
            "progress": None
            if progress is None
            else {
                "stage": progress.stage.value,
                "layer": progress.layer,
                "layers": progress.layers,
                "done_bytes": progress.done_bytes,
                "total_bytes": progress.total_bytes,
            },
            "result": self.result.as_json() if self.result else None,
            "error": as_record(self.error) if self.error else None,
        }


class JobQueue:
    """Runs jobs in order of submission; owned by the daemon, ended by `close`."""

    def __init__(self, build: Build) -> None:
        self._build = build
        self._jobs: dict[str, Job] = {}
        self._queue: asyncio.Queue[Job] = asyncio.Queue(MAX_QUEUED)
        self._runner: asyncio.Task[None] | None = None
        self._running: asyncio.Task[BuildResult] | None = None
        self._closing = False

    def start(self) -> None:
        """Starts the runner."""
        self._runner = asyncio.create_task(self._run())

    def submit(self, request: ImageRequest, owner: str = "") -> Job:
        """The owner's job of an equal request that has not ended, or a new one; QueueFull."""
        for job in self._jobs.values():
            if job.request == request and job.owner == owner and not job.ended:
                return job
        job = Job(uuid4().hex, request, owner)
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull as error:
            raise QueueFull(f"{MAX_QUEUED} preloads are queued", retry_seconds=30) from error
        self._jobs[job.identity] = job
        self._forget()
        return job

    def get(self, identity: str) -> Job:
        """One job; NotFound."""
        job = self._jobs.get(identity)
        if job is None:
            raise NotFound(f"no preload job {identity!r}")
        return job

    def jobs(self) -> list[Job]:
        """All jobs that are remembered, oldest first."""
        return list(self._jobs.values())

    def cancel(self, identity: str) -> Job:
        """Ends a job; its blobs stay for a later one to resume."""
        job = self.get(identity)
        if job.state is JobState.RUNNING and self._running is not None:
            self._running.cancel()
        elif job.state is JobState.QUEUED:
            job.state = JobState.CANCELLED
            job.touch()
        return job

    async def close(self) -> None:
        """Cancels what runs and ends the runner."""
        self._closing = True
        for task in (self._runner, self._running):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _forget(self) -> None:
        ended = [job for job in self._jobs.values() if job.ended]
        for job in ended[: max(0, len(ended) - MAX_KEPT)]:
            del self._jobs[job.identity]

    async def _run(self) -> None:
        while True:
            job = await self._queue.get()
            if not job.ended:
                await self._one(job)

    async def _one(self, job: Job) -> None:
        def report(progress: Progress) -> None:
            job.progress = progress
            job.touch()

        job.state, job.started = JobState.RUNNING, time.monotonic()
        job.touch()
        self._running = asyncio.ensure_future(self._build(job.request, report))
        try:
            job.result = await self._running
            job.state = JobState.DONE
        except CubecacheError as error:
            job.state, job.error = JobState.FAILED, error
        except asyncio.CancelledError:
            job.state = JobState.CANCELLED
            if self._closing:
                self._running.cancel()
                raise
        except Exception as error:
            logger.exception("preload job %s failed", job.identity)
            job.state = JobState.FAILED
            job.error = CubecacheError(f"internal error: {type(error).__name__}: {error}")
        finally:
            self._running = None
            job.touch()
