"""`Cube` against a keeper whose pods have no machines: watching, changing, stopping, starting."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from cube.keeper import keeper as keepers
from cube.keeper.keeper import WATCHER_LIMIT, Keeper
from cube.keeper.podlife import PodLife
from cube.keeper.server import make_application
from cube.keeper.setkeeping import SetKeeper
from cube.keeper.status import PodStatus
from cube.orchestrator import Cube
from cube.pod.model import Container, Pod
from imagecache.errors import LimitExceeded, NotFound, Rejected, Unavailable
from imagecache.settings import Settings

pytestmark = pytest.mark.quick
SECONDS = 60  # far beyond what any step takes


async def run_without_machine(life: PodLife) -> None:
    """A life whose containers run at once and end when they are told to."""
    for one in life.status.containers:
        one.state, one.reason, one.ready = "running", "Running", True
    life.status.address = "10.0.2.15"
    life._changed()
    await life._stop.wait()
    life.status.terminating = True
    for one in life.status.containers:
        one.state, one.reason = "terminated", "Completed"
    life._changed()
    life.over.set()


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Settings]:
    monkeypatch.setattr(PodLife, "run", run_without_machine)
    with tempfile.TemporaryDirectory() as directory:  # tmp_path may be too long for a socket
        state = Path(directory)
        yield Settings(state, f"file://{state}/store")


@contextlib.asynccontextmanager
async def keeping(settings: Settings) -> AsyncIterator[Keeper]:
    keeper = Keeper(settings, settings.state_dir / "cache")
    sets = SetKeeper(keeper)
    runner = web.AppRunner(make_application(keeper, sets), shutdown_timeout=0.1)
    await keeper.open()
    await sets.open()
    await runner.setup()
    await web.UnixSite(runner, str(settings.state_dir / "pods.sock")).start()
    try:
        yield keeper
    finally:
        await runner.cleanup()
        await sets.close()
        await keeper.close()


def pod(name: str, image: str = "one") -> Pod:
    return Pod(name=name, grace_seconds=1, containers=(Container(name="a", image=image),))


async def until(watch: AsyncIterator[PodStatus], name: str, state: str) -> PodStatus:
    async with asyncio.timeout(SECONDS):
        async for status in watch:
            if status.key == name and status.containers[0].state == state:
                return status
    raise AssertionError(f"{name} is never {state}")


async def test_a_watch_tells_every_pods_last_state_in_order(settings: Settings) -> None:
    async with keeping(settings), Cube(settings=settings) as cube:
        await cube.run(pod("early"), seconds=SECONDS)
        watch = cube.watch()
        seen = await until(watch, "early", "running")
        for name in ("b", "c"):
            await cube.apply(pod(name))
            version = seen.version
            seen = await until(watch, name, "running")
            assert seen.version > version
        await cube.stop("c")
        assert (await until(watch, "c", "terminated")).version > seen.version
        await watch.aclose()
        # One that comes later gets what it has not seen, and nothing else first.
        later = cube.watch(since=seen.version)
        async with asyncio.timeout(SECONDS):
            first = await anext(later)
        assert first.key == "c" and first.version > seen.version
        await later.aclose()


async def test_what_changes_while_another_is_told_is_told(settings: Settings) -> None:
    """A slow reader: both pods change again between the two answers."""
    async with keeping(settings) as keeper:
        await keeper.apply(pod("a"))
        await keeper.apply(pod("b"))
        await keeper.wait_for("b", lambda status: status.ready, SECONDS)
        watch = keeper.watch(-1)
        async with asyncio.timeout(SECONDS):
            await anext(watch)
            keeper.changed(keeper.get("a"))
            keeper.changed(keeper.get("b"))
            told = [status.key async for status in _some(watch, 2)]
        assert sorted(told) == ["a", "b"]
        await watch.aclose()


async def _some(watch: AsyncIterator[PodStatus | None], count: int) -> AsyncIterator[PodStatus]:
    while count:
        status = await anext(watch)
        if status is not None:
            count -= 1
            yield status


async def test_stop_keeps_a_pod_and_apply_starts_it_again(settings: Settings) -> None:
    """Also over a keeper that ends in between: stopped stays stopped, running goes on."""
    async with keeping(settings), Cube(settings=settings) as cube:
        first = await cube.run(pod("a"), seconds=SECONDS)
        await cube.run(pod("b"), seconds=SECONDS)
        stopped = await cube.stop("a")
        assert not stopped.ready and stopped.address == "" and not stopped.terminating
        assert (await cube.stop("a")).uid == first.uid  # again: nothing to do
    async with keeping(settings), Cube(settings=settings) as cube:
        by_name = {status.key: status for status in await cube.list()}
        assert not by_name["a"].ready and by_name["a"].version > first.version
        assert (await cube.wait("b", seconds=SECONDS)).ready
        again = await cube.run(pod("a"), seconds=SECONDS)
        assert again.ready and again.uid == first.uid and again.created == first.created


async def test_an_update_ends_the_old_and_the_same_again_changes_nothing(
    settings: Settings,
) -> None:
    async with keeping(settings) as keeper, Cube(settings=settings) as cube:
        first = await cube.run(pod("a"), seconds=SECONDS)
        old = keeper.get("a")
        assert (await cube.apply(pod("a"))).version == first.version
        changed = await cube.run(pod("a", "two"), seconds=SECONDS)
        assert old.over.is_set() and keeper.get("a") is not old
        assert changed.uid == first.uid and changed.containers[0].image == "two"
        # Two changes at once: one after the other, and one of them stays.
        await asyncio.gather(*(cube.apply(pod("a", image)) for image in ("three", "four")))
        assert (await cube.wait("a", seconds=SECONDS)).containers[0].image in ("three", "four")
        await cube.delete("a")
        with pytest.raises(NotFound):
            await cube.stop("a")
        assert await cube.list() == []


async def test_a_watch_that_cannot_be_says_why(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cube(settings=settings) as cube:
        with pytest.raises(Unavailable):
            await anext(cube.watch())
    monkeypatch.setattr(keepers, "_QUIET_SECONDS", 0.05)
    async with Cube(settings=settings) as cube:
        async with keeping(settings) as keeper:
            with pytest.raises(Rejected):
                await anext(cube.watch(since="x"))  # type: ignore[arg-type]  # on purpose
            with contextlib.ExitStack() as places:
                for _ in range(WATCHER_LIMIT):
                    places.enter_context(keeper.watching())
                with pytest.raises(LimitExceeded):
                    await anext(cube.watch())
            # Who goes away without a word gives the place back, though nothing changes.
            await keeper.apply(pod("a"))
            watch = cube.watch()
            await until(watch, "a", "running")
            assert keeper._watchers == 1
            await watch.aclose()
            async with asyncio.timeout(SECONDS):
                while keeper._watchers:
                    await asyncio.sleep(0.01)
            watch = cube.watch()
            await until(watch, "a", "running")
        with pytest.raises(Unavailable):  # the keeper has ended
            async with asyncio.timeout(SECONDS):
                await anext(watch)
