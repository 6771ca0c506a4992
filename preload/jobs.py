"""Preload jobs: a bounded queue by priority, so many builds at a time, one job for equal requests.

Every job is in the table before its submitter hears of it, and a restarted daemon goes on where
the last one ended: what ran is queued again, and fails with a reason once it ended five daemons
without having fetched anything more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from uuid import uuid4

from imagecache.build.progress import BuildResult, Progress, Report, Stage
from imagecache.composition import ImageRequest
from imagecache.errors import Busy, CubecacheError, NotFound, as_record
from preload.jobstate import Job, JobState
from preload.jobtable import JobTable

__all__ = ["MAX_ATTEMPTS", "Job", "JobQueue", "JobState", "QueueFull"]

logger = logging.getLogger(__name__)

MAX_QUEUED = 5000
MAX_KEPT = 200
MAX_ATTEMPTS = 5
PROGRESS_BYTES = 256 << 10
RETRY_SECONDS = 30.0


class QueueFull(Busy):
    """Too many jobs wait; ask again after `retry_seconds`."""

    def __init__(self, message: str, *, retry_seconds: float = RETRY_SECONDS) -> None:
        super().__init__(message, remedy=f"try again in {retry_seconds:.0f} seconds")
        self.retry_seconds = retry_seconds


Build = Callable[[Job, Report], Awaitable[BuildResult]]


class JobQueue:
    """Runs jobs by priority, then in order; owned by the daemon: `start`, then `close`."""

    def __init__(
        self,
        build: Build,
        table: JobTable,
        *,
        quota: Callable[[], int] = lambda: MAX_QUEUED,
        concurrency: Callable[[], int] = lambda: 1,
    ) -> None:
        """`concurrency` is how many builds run at once; `quota` is of one owner's open jobs."""
        self._build = build
        self._table = table
        self._quota = quota
        self._concurrency = concurrency
        self._jobs: dict[str, Job] = {}
        self._wake = asyncio.Event()
        self._saving = asyncio.Lock()
        self._runner: asyncio.Task[None] | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._saves: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self) -> None:
        """Takes up the table's jobs and starts the runner."""
        taken_up = []
        for row in await asyncio.to_thread(self._table.load):
            job = Job.of(row)
            self._jobs[job.identity] = job
            if job.state is JobState.RUNNING:
                self._take_up(job)
                taken_up.append(job)
        await self._save(taken_up)
        self.go_on()

    def go_on(self) -> None:
        """Runs jobs (again, after `suspend`)."""
        self._closing = False
        self._wake.set()
        self._runner = asyncio.create_task(self._run())

    def _take_up(self, job: Job) -> None:
        if job.attempts < MAX_ATTEMPTS:
            job.state = JobState.QUEUED
            return
        job.state = JobState.FAILED
        job.error = as_record(
            CubecacheError(
                f"the daemon ended {job.attempts} times while it preloaded {job.request.reference}",
                remedy="see the daemon's log, then preload it again",
            )
        )

    async def submit(
        self,
        requests: Sequence[ImageRequest],
        *,
        owner: str = "",
        priority: int = 0,
        pin_seconds: int = 0,
        bytes_per_second: int = 0,
        warm: str = "",
    ) -> list[Job]:
        """The owner's jobs of equal requests that have not ended, or new ones; QueueFull.

        All are in the table when this returns, or none is queued.
        """
        waiting = {(x.request, x.owner): x for x in self._jobs.values() if not x.ended}
        answer, fresh = [], []
        for request in requests:
            job = waiting.get((request, owner))
            if job is None or job.pin_seconds < pin_seconds or (warm and job.warm != warm):
                job = Job(uuid4().hex, request, owner, priority, pin_seconds)
                job.bytes_per_second, job.warm = bytes_per_second, warm
                job.submitted = time.time()
                waiting[request, owner] = job
                fresh.append(job)
            answer.append(job)
        mine = sum(not x.ended for x in self._jobs.values() if x.owner == owner)
        if fresh and mine + len(fresh) > self._quota():
            raise QueueFull(f"{mine} preloads of this owner have not ended")
        if fresh and len(waiting) > MAX_QUEUED:
            raise QueueFull(f"{MAX_QUEUED} preloads have not ended")
        for job in fresh:
            self._jobs[job.identity] = job
        try:
            await self._save(fresh)
        except CubecacheError:
            for job in fresh:
                self._jobs.pop(job.identity, None)
            raise
        await self._forget()
        self._wake.set()
        return answer

    def get(self, identity: str) -> Job:
        """One job; NotFound."""
        job = self._jobs.get(identity)
        if job is None:
            raise NotFound(f"no preload job {identity!r}")
        return job

    def jobs(self) -> list[Job]:
        """All jobs that are remembered, oldest first."""
        return list(self._jobs.values())

    async def cancel(self, identity: str) -> Job:
        """Ends a job; its blobs stay for a later one to resume."""
        return await self._stop(self.get(identity), JobState.CANCELLED)

    async def pause(self, identity: str) -> Job:
        """Stops a job until `resume`; Busy where it has ended."""
        job = self.get(identity)
        if job.ended:
            raise Busy(f"preload job {identity} has ended ({job.state})")
        return await self._stop(job, JobState.PAUSED)

    async def resume(self, identity: str) -> Job:
        """Queues a paused job again; Busy where it has ended."""
        job = self.get(identity)
        if job.ended:
            raise Busy(f"preload job {identity} has ended ({job.state})")
        if job.state is JobState.PAUSED:
            job.state = JobState.QUEUED
            job.touch()
            await self._save([job])
            self._wake.set()
        return job

    async def _stop(self, job: Job, state: JobState) -> Job:
        task = self._running.get(job.identity)
        if job.state is JobState.RUNNING and task is not None:
            job.stop_as = state
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._save([job])
        elif not job.ended:
            job.state = state
            job.touch()
            await self._save([job])
        return job

    async def suspend(self) -> None:
        """Stops all builds; what ran is queued again, for `go_on` or for the next daemon."""
        self._closing = True
        tasks = [task for task in (self._runner, *self._running.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._saves, return_exceptions=True)
        self._runner = None

    async def close(self) -> None:
        """Ends the runner; what ran is queued again by the next daemon."""
        await self.suspend()
        for job in self._jobs.values():
            job.touch()  # nobody waits for what will not come from here

    async def _save(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        async with self._saving:
            await asyncio.to_thread(self._table.save, [job.row() for job in jobs])

    async def _forget(self) -> None:
        ended = [job.identity for job in self._jobs.values() if job.ended]
        old = ended[: max(0, len(ended) - MAX_KEPT)]
        for identity in old:
            del self._jobs[identity]
        if old:
            async with self._saving:
                await asyncio.to_thread(self._table.drop, old)

    def _next(self) -> Job | None:
        queued = [job for job in self._jobs.values() if job.state is JobState.QUEUED]
        return max(queued, key=lambda job: job.priority, default=None)  # the first of equals

    async def _run(self) -> None:
        while True:
            job = self._next() if len(self._running) < max(1, self._concurrency()) else None
            if job is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            job.state, job.stop_as = JobState.RUNNING, JobState.CANCELLED
            job.readable = False
            job.slot = self._free_slot()
            job.attempts += 1
            job.touch()
            task = asyncio.create_task(self._one(job), name=f"preload {job.identity}")
            self._running[job.identity] = task
            task.add_done_callback(partial(self._over, job))

    def _free_slot(self) -> int:
        taken = {self._jobs[identity].slot for identity in self._running}
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _over(self, job: Job, _: asyncio.Task[None]) -> None:
        del self._running[job.identity]
        if job.state is JobState.RUNNING:  # cancelled before its first step
            self._stopped(job)
            job.touch()
        self._wake.set()

    def _stopped(self, job: Job) -> None:
        # At a daemon's end it is not the job's fault: the next daemon goes on with it.
        job.state = JobState.QUEUED if self._closing else job.stop_as
        job.attempts -= job.state in {JobState.QUEUED, JobState.PAUSED}

    def _got_further(self, job: Job) -> None:
        """Attempts that fetched something do not count: in the end there is nothing left to fetch.

        What ends daemons without that (its conversion, say) still ends with the last attempt.
        """
        job.attempts = 1
        task = asyncio.create_task(self._save([job]))
        self._saves.add(task)
        task.add_done_callback(self._saved)

    def _saved(self, task: asyncio.Task[None]) -> None:
        self._saves.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("the job table cannot be written: %s", task.exception())

    async def _one(self, job: Job) -> None:
        begun: dict[int, int] = {}

        def report(progress: Progress) -> None:
            job.pace.note(progress)
            job.touch()
            if progress.stage is Stage.PULL and job.attempts > 1:
                base = begun.setdefault(progress.layer, progress.done_bytes)
                if progress.done_bytes - base >= PROGRESS_BYTES:
                    self._got_further(job)

        try:
            job.result = (await self._saved_and_built(job, report)).as_json()
            job.state = JobState.DONE
        except CubecacheError as error:
            job.state, job.error = JobState.FAILED, as_record(error)
        except asyncio.CancelledError:
            self._stopped(job)
        except Exception as error:
            logger.exception("preload failed oddly", extra={"job": job.identity})
            job.state = JobState.FAILED
            told = CubecacheError(f"internal error: {type(error).__name__}: {error}")
            job.error = as_record(told)
        finally:
            job.touch()
        try:
            await self._save([job])
        except CubecacheError as error:
            logger.error("the job table cannot be written: %s", error)

    async def _saved_and_built(self, job: Job, report: Report) -> BuildResult:
        await self._save([job])
        return await self._build(job, report)
