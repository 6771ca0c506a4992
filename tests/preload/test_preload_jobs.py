"""The job queue: order, sharing, cancelling, failing, watching."""

import asyncio

import pytest

from imagecache.build.progress import BuildResult, Progress, Report, Stage
from imagecache.composition import ImageRequest
from imagecache.errors import Busy, NotFound, Rejected
from preload import jobs
from preload.jobs import Job, JobQueue, JobState

pytestmark = pytest.mark.quick


class Builds:
    """A build that waits until it is let go, and notes what ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.together = 0
        self.most_together = 0
        self.go = asyncio.Event()

    async def __call__(self, request: ImageRequest, report: Report) -> BuildResult:
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        try:
            report(Progress(Stage.PULL, 1, 2, 3, 4))
            await self.go.wait()
            self.ran.append(request.reference)
            if "bad" in request.reference:
                raise Rejected("broken")
            return BuildResult(request.reference, "sha256:x", "y", 1, 1)
        finally:
            self.together -= 1


async def ended(job: Job) -> Job:
    while not job.ended:
        await job.watch(job.version, 5)
    return job


async def test_jobs_run_one_at_a_time_in_order_and_equal_ones_are_shared() -> None:
    """I7: many preloads of one image are one job; of many images they queue."""
    builds = Builds()
    queue = JobQueue(builds)
    queue.start()
    first = [queue.submit(ImageRequest("a")) for _ in range(100)]
    others = [queue.submit(ImageRequest(name)) for name in "bcd"]
    assert len(set(map(id, first))) == 1
    builds.go.set()
    for job in (first[0], *others):
        assert (await ended(job)).state is JobState.DONE
    assert builds.ran == ["a", "b", "c", "d"]
    assert builds.most_together == 1
    assert queue.submit(ImageRequest("a")) is not first[0]
    await queue.close()


async def test_failure_and_cancel_end_a_job_and_leave_the_queue_running() -> None:
    builds = Builds()
    queue = JobQueue(builds)
    queue.start()
    running = queue.submit(ImageRequest("a"))
    waiting = queue.submit(ImageRequest("b"))
    while running.state is JobState.QUEUED:
        await running.watch(running.version, 1)
    queue.cancel(waiting.identity)
    queue.cancel(running.identity)
    assert (await ended(running)).state is JobState.CANCELLED
    assert waiting.state is JobState.CANCELLED
    builds.go.set()
    bad, good = queue.submit(ImageRequest("bad")), queue.submit(ImageRequest("good"))
    assert (await ended(bad)).state is JobState.FAILED
    assert isinstance(bad.error, Rejected)
    assert (await ended(good)).state is JobState.DONE
    assert bad.as_json()["error"]["kind"] == "Rejected"
    with pytest.raises(NotFound):
        queue.get("nothing")
    await queue.close()


async def test_full_queue_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_QUEUED", 3)
    queue = JobQueue(Builds())
    for name in "abc":
        queue.submit(ImageRequest(name))
    with pytest.raises(Busy):
        queue.submit(ImageRequest("d"))
    await queue.close()
