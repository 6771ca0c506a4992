"""Builders of one image meet; leases end with their holder, by the store's clock."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from pathlib import Path

import pytest
from kits.realm import FAST, build, write_images

from imagecache.blockimage.generations import State, parse_generations
from imagecache.blockimage.holdings import LeaseRecord
from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.manifest import Face
from imagecache.blockimage.records import RootRecord
from imagecache.catalog import Catalog
from imagecache.errors import Busy, Unsupported
from imagecache.leases.build import BuildLease, BuildLeases, LeaseLost, is_dead, new_holder
from imagecache.leases.clock import StoreClock
from imagecache.leases.pins import pin
from imagecache.store.memory import MemoryStore

KEY = ImageKey("sha256:" + "a" * 64, Face.EROFS, "{}")


def root(generation: int) -> RootRecord:
    return RootRecord(
        "default", generation, KEY.image, "erofs", "{}", 1, "linux/amd64", KEY.image,
        "b" * 64, "c" * 64, (), (), 1, 1, 1,
    )  # fmt: skip


async def lease_of(store: MemoryStore, holder: str = "one") -> BuildLease:
    met = await BuildLeases(Catalog(store, "default"), holder=holder, times=FAST).meet(KEY)
    assert isinstance(met, BuildLease)
    return met


async def test_late_builder_waits_and_uses_the_first_one_s_work() -> None:
    """Two builders of one image: one lease, one commit, the other is given the root."""
    store = MemoryStore()
    first = await lease_of(store)
    told: list[str] = []
    late = asyncio.create_task(
        BuildLeases(Catalog(store, "default"), times=FAST).meet(KEY, told.append)
    )
    async with asyncio.timeout(60):
        while not told:
            await asyncio.sleep(0.01)
        await first.commit(root(first.generation))
        await first.release()
        assert await late == root(first.generation)
    assert told[0].startswith("one")


async def test_two_builds_at_once_convert_once(tmp_path: Path) -> None:
    """The real pipeline, two spools, one store: what the second reports as new is nothing."""
    (reference,) = write_images(tmp_path, 1)
    store = MemoryStore()
    results = await asyncio.gather(
        build(store, tmp_path / "one", reference), build(store, tmp_path / "two", reference)
    )
    assert sorted(result.new_layers for result in results) == [0, 2]
    assert len({result.block_image for result in results}) == 1
    assert not [key for key in store.objects if "/leases/" in key]


async def test_lease_that_ran_out_is_taken_over_and_its_holder_starts_over() -> None:
    """A builder frozen past its time does not commit; no host's clock is asked."""
    store = MemoryStore()
    frozen = await lease_of(store, "frozen")
    key = Catalog(store, "default").keys.build_lease(KEY)
    store._modified[key] -= FAST.ttl + 5
    with pytest.raises(LeaseLost, match="ran out"):
        await frozen.confirm()
    other = await lease_of(store, "other")
    with pytest.raises(LeaseLost, match="took"):
        await frozen.commit(root(1))
    with pytest.raises(LeaseLost):
        await frozen.renew()
    await frozen.release()
    await other.commit(root(1))


async def test_dead_neighbour_s_lease_is_taken_at_once() -> None:
    """A killed builder of this host is not waited for; one of another host is."""
    store = MemoryStore()
    child = subprocess.Popen(["true"])
    child.wait(timeout=60)
    mine = new_holder()
    dead = mine.replace(f".{os.getpid()}.", f".{child.pid}.")
    assert is_dead(dead)
    assert not is_dead(mine)
    assert not is_dead("h.elsewhere-123456789abc.1.aa.bb")
    catalog = Catalog(store, "default")
    await catalog.active_generation()
    record = LeaseRecord("build", f"{dead}.aa", 600, generation=1)
    await store.put(catalog.keys.build_lease(KEY), record.encode())
    assert await asyncio.wait_for(lease_of(store), 5)


class Deaf(MemoryStore):
    """Loses the answer of each conditional put, and asks again, as a retry does."""

    async def put(self, key, body, *, only_if_absent=False):
        await super().put(key, body, only_if_absent=only_if_absent)
        return await super().put(key, body, only_if_absent=only_if_absent)


async def test_claim_whose_answer_was_lost_is_known_again() -> None:
    """G8: nobody waits for himself."""
    assert await asyncio.wait_for(lease_of(Deaf()), 5)


async def test_commit_needs_an_active_generation() -> None:
    """Invariant 1: a generation retired during the build takes no root."""
    store = MemoryStore()
    lease = await lease_of(store)
    await Catalog(store, "default").mark(lease.generation, State.RETIRED)
    with pytest.raises(LeaseLost, match="closed"):
        await lease.commit(root(lease.generation))


class Loose(MemoryStore):
    """A store that ignores conditions (G13): a look before the put is all there is."""

    async def put(self, key, body, *, only_if_absent=False):
        if only_if_absent and key in self.objects:
            return False
        await asyncio.sleep(0)
        await super().put(key, body)
        return True

    async def claims_are_atomic(self) -> bool:
        return False


async def test_store_without_conditions_is_warned_of_and_still_right(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """G13: of builders that claim in one moment the last word stays, the others wait."""
    store = Loose()
    with caplog.at_level(logging.WARNING):
        met = [
            asyncio.create_task(
                BuildLeases(Catalog(store, "default"), holder=f"b{n}", times=FAST).meet(KEY)
            )
            for n in range(4)
        ]
        done, waiting = await asyncio.wait(met, timeout=1.0)
        leases = [task.result() for task in done]
        assert len(leases) == 1
        winner = leases[0]
        assert isinstance(winner, BuildLease)
        await winner.commit(root(winner.generation))
        await winner.release()
        for task in waiting:
            assert await task == root(winner.generation)
    assert "ignores conditions" in caplog.text


async def test_pin_of_a_closing_generation_asks_again() -> None:
    """What a collector is about to leave cannot be newly relied on."""
    store = MemoryStore()
    catalog = Catalog(store, "default")
    lease = await lease_of(store)
    await lease.commit(root(1))
    await pin(catalog, root(1), "kept", 60)
    await catalog.mark(1, State.RETIRED)
    await catalog.mark(1, State.CLOSING)
    with pytest.raises(Busy, match="again"):
        await pin(catalog, root(1), "kept", 60)


async def test_store_s_clock_is_not_the_host_s() -> None:
    """Times are those at which the store says it took an object."""
    store = MemoryStore()
    clock = StoreClock(Catalog(store, "default"))
    now = await clock.now()
    assert await clock.require_agreement(now + 60) >= now
    with pytest.raises(Unsupported, match="clocks"):
        await clock.require_agreement(now + 3600)


@pytest.mark.quick
def test_states_only_move_forward_whatever_is_written_when() -> None:
    """Invariant 3: the furthest marker holds, in any order and at any time."""
    markers = [("p/00000003.expired.json", 5.0), ("p/00000003.active.json", 900.0)]
    (known,) = parse_generations("p/", markers)
    assert known.state is State.EXPIRED
    assert known.since(State.EXPIRED) == 5.0
    assert not known.readable
    with pytest.raises(Unsupported, match="upgrade"):
        parse_generations("p/", [("p/00000001.melted.json", 1.0)])
