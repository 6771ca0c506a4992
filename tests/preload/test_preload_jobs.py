"""The job queue: order, sharing, cancelling, failing, pausing, quotas, restarts."""

import asyncio
from pathlib import Path

import pytest

from imagecache.build.progress import BuildResult, Progress, Report, Stage
from imagecache.composition import ImageRequest
from imagecache.errors import Busy, NotFound, Rejected
from imagecache.settings import PricesSection
from preload.jobs import MAX_ATTEMPTS, Job, JobQueue, JobState, QueueFull
from preload.jobtable import JobTable
from preload.pace import Pace
from preload.planning import Experience, LayerFacts, experience, plan, with_cost

pytestmark = pytest.mark.quick


class Builds:
    """A build that waits until it is let go, and notes what ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.together = 0
        self.most_together = 0
        self.go = asyncio.Event()

    async def __call__(self, job: Job, report: Report) -> BuildResult:
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        reference = job.request.reference
        try:
            report(Progress(Stage.PULL, 1, 2, 3, 4))
            await self.go.wait()
            self.ran.append(reference)
            if "bad" in reference:
                raise Rejected("broken")
            return BuildResult(reference, "sha256:x", "y", 1, 1)
        finally:
            self.together -= 1


@pytest.fixture
def table(tmp_path: Path) -> JobTable:
    return JobTable(tmp_path / "jobs.db")


async def submit(queue: JobQueue, *names: str, **rest: object) -> list[Job]:
    return await queue.submit([ImageRequest(name) for name in names], **rest)  # type: ignore


async def ended(job: Job) -> Job:
    while not job.ended:
        await job.watch(job.version, 5)
    return job


async def until(job: Job, state: JobState) -> None:
    while job.state is not state:
        await job.watch(job.version, 5)


async def test_jobs_run_one_at_a_time_by_priority_and_equal_ones_are_shared(
    table: JobTable,
) -> None:
    """I7: many preloads of one image are one job; of many images they queue."""
    builds = Builds()
    queue = JobQueue(builds, table)
    await queue.start()
    first = [(await submit(queue, "a"))[0] for _ in range(100)]
    assert len(set(map(id, first))) == 1
    await until(first[0], JobState.RUNNING)
    others = await submit(queue, "b", "c", "b")
    assert others[0] is others[2]
    urgent = await submit(queue, "d", priority=5)
    builds.go.set()
    for job in (*others, *urgent):
        assert (await ended(job)).state is JobState.DONE
    assert builds.ran == ["a", "d", "b", "c"]
    assert builds.most_together == 1
    assert (await submit(queue, "a"))[0] is not first[0]
    await queue.close()


async def test_failure_and_cancel_end_a_job_and_leave_the_queue_running(table: JobTable) -> None:
    builds = Builds()
    queue = JobQueue(builds, table)
    await queue.start()
    running, waiting = await submit(queue, "a", "b")
    await until(running, JobState.RUNNING)
    await queue.cancel(waiting.identity)
    await queue.cancel(running.identity)
    assert running.state is JobState.CANCELLED
    assert waiting.state is JobState.CANCELLED
    builds.go.set()
    bad, good = await submit(queue, "bad", "good")
    assert (await ended(bad)).state is JobState.FAILED
    assert bad.error is not None and bad.error["kind"] == "Rejected"
    assert (await ended(good)).state is JobState.DONE
    with pytest.raises(NotFound):
        queue.get("nothing")
    await queue.close()


async def test_paused_jobs_wait_until_they_are_resumed(table: JobTable) -> None:
    builds = Builds()
    queue = JobQueue(builds, table)
    await queue.start()
    first, second = await submit(queue, "a", "b")
    await until(first, JobState.RUNNING)
    assert (await queue.pause(first.identity)).state is JobState.PAUSED
    assert (await queue.pause(second.identity)).state is JobState.PAUSED
    builds.go.set()
    await queue.resume(second.identity)
    assert (await ended(second)).state is JobState.DONE
    assert first.state is JobState.PAUSED
    await queue.resume(first.identity)
    assert (await ended(first)).state is JobState.DONE
    for change in (queue.pause, queue.resume):
        with pytest.raises(Busy):
            await change(first.identity)
    assert (await queue.cancel(first.identity)).state is JobState.DONE
    await queue.close()


async def test_owners_have_quotas_and_jobs_of_their_own(table: JobTable) -> None:
    """I7: over the quota is 429 for that owner only, and nothing of the call is queued."""
    queue = JobQueue(Builds(), table, quota=lambda: 3)
    (a,) = await submit(queue, "x", owner="a")
    (b,) = await submit(queue, "x", owner="b")
    assert a is not b
    with pytest.raises(QueueFull) as full:
        await submit(queue, "1", "2", "3", owner="a")
    assert full.value.retry_seconds > 0
    assert len(queue.jobs()) == 2
    await submit(queue, "1", "2", owner="a")
    assert await submit(queue, "1", owner="a")  # an equal one is no new job
    await submit(queue, "1", "2", owner="b")
    await queue.close()


async def test_a_restart_takes_up_what_had_not_ended(table: JobTable) -> None:
    """I9: after a clean end or a kill every job is queued, paused, or has ended with a reason."""
    builds = Builds()
    queue = JobQueue(builds, table)
    await queue.start()
    running, queued, paused = await submit(queue, "a", "b", "c", owner="o", priority=2)
    await until(running, JobState.RUNNING)
    await queue.pause(paused.identity)
    await queue.close()
    builds.go.set()
    again = JobQueue(builds, table)
    await again.start()
    found = {job.identity: job for job in again.jobs()}
    assert found.keys() == {running.identity, queued.identity, paused.identity}
    assert found[running.identity].owner == "o"
    for job in (running, queued):
        assert (await ended(found[job.identity])).state is JobState.DONE
    assert found[paused.identity].state is JobState.PAUSED
    await again.close()
    last = JobQueue(builds, table)
    await last.start()
    assert last.get(running.identity).as_json()["result"]["name"] == "a"
    await last.close()


async def test_a_job_that_ends_every_daemon_fails_with_a_reason(table: JobTable) -> None:
    """I9: killed while running, it is tried again, but never for ever."""
    identity = ""
    for attempt in range(1, MAX_ATTEMPTS + 1):
        queue = JobQueue(Builds(), table)
        await queue.start()
        (job,) = await submit(queue, "a") if attempt == 1 else [queue.get(identity)]
        identity = job.identity
        while table.load()[0].attempts < attempt:
            await asyncio.sleep(0.01)
        assert queue._runner is not None
        queue._table = JobTable(Path("/dev/null/none"))  # as a kill: nothing is written any more
        await queue.close()
    assert table.load()[0].state == "running"
    queue = JobQueue(Builds(), table)
    await queue.start()
    job = queue.get(identity)
    assert job.state is JobState.FAILED
    assert job.error is not None and f"ended {MAX_ATTEMPTS} times" in job.error["message"]
    await queue.close()


async def test_a_damaged_table_is_set_aside(tmp_path: Path) -> None:
    """H6: a table that is no database costs the jobs, not the daemon."""
    (tmp_path / "jobs.db").write_bytes(b"no database" * 100)
    queue = JobQueue(Builds(), JobTable(tmp_path / "jobs.db"))
    await queue.start()
    assert queue.jobs() == []
    assert (tmp_path / "jobs.damaged").exists()
    await submit(queue, "a")
    await queue.close()


def test_pace_tells_rate_and_time_left_of_each_layer() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.as_json() is None
    pace.note(Progress(Stage.PULL, 1, 2, 0, 1000))
    now[0] = 2.0
    pace.note(Progress(Stage.PULL, 1, 2, 200, 1000))
    told = pace.as_json()
    assert told is not None
    assert (told["bytes_per_second"], told["seconds_left"]) == (100.0, 8.0)
    pace.note(Progress(Stage.PULL, 1, 2, 50, 1000))  # began anew
    now[0] = 3.0
    pace.note(Progress(Stage.PULL, 1, 2, 150, 1000))
    pace.note(Progress(Stage.FLATTEN, 2, 2, 5, 10))
    told = pace.as_json()
    assert told is not None
    assert [(item["layer"], item["stage"]) for item in told["by_layer"]] == [
        (1, "pull"),
        (2, "flatten"),
    ]
    assert told["by_layer"][0]["bytes_per_second"] == 100.0
    assert told["bytes_per_second"] is None


def test_plans_count_what_is_missing() -> None:
    layers = [LayerFacts(100, 0, True), LayerFacts(200, 50, False), LayerFacts(300, 300, False)]
    known = experience([{"downloaded_bytes": 100, "stored_bytes": 150, "seconds": 2.0}, {}])
    assert known == Experience(1.5, 50.0)
    made = plan("i", "sha256:x", layers, present=False, known=known)
    assert (made.layers, made.missing_layers, made.total_bytes) == (3, 2, 600)
    assert (made.missing_bytes, made.download_bytes) == (500, 150)
    assert (made.store_bytes_estimate, made.seconds_estimate) == (750, 10.0)
    there = plan("i", "sha256:x", layers, present=True, known=Experience())
    assert (there.missing_layers, there.download_bytes, there.seconds_estimate) == (0, 0, 0.0)
    assert plan("i", "d", layers, present=False, known=Experience()).seconds_estimate is None


def test_plans_tell_what_the_store_would_charge() -> None:
    """Nothing without prices; what is there already costs nothing more."""
    layers = [LayerFacts(1 << 30, 0, False)]
    made = plan("i", "d", layers, present=False, known=Experience(1.0, None))
    assert with_cost(made, PricesSection()) is made
    prices = PricesSection(gib_month=0.02, thousand_writes=0.005)
    told = with_cost(made, prices)
    assert told.month_cost_estimate == 0.02
    assert told.once_cost_estimate == round((64 + 8) / 1000 * 0.005, 6)
    there = with_cost(plan("i", "d", layers, present=True, known=Experience()), prices)
    assert (there.month_cost_estimate, there.once_cost_estimate) == (0, 0)
