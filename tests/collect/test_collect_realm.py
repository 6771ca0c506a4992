"""Collection of real images: what goes, what stays, what a crash at each write leaves."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from kits.realm import Crash, CrashStore, broken, build, built_realm, copied, write_images

from imagecache.blockimage.generations import State
from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.manifest import Face, canonical_options
from imagecache.catalog import Catalog
from imagecache.collect.plan import Policy
from imagecache.collect.report import CollectReport
from imagecache.collect.run import Collector, Wishes
from imagecache.composition import alias_name
from imagecache.errors import Corrupt, Denied, Unavailable, Unsupported
from imagecache.leases.build import LeaseLost
from imagecache.leases.clock import StoreClock
from imagecache.leases.collector import CollectorLease
from imagecache.leases.pins import pin
from imagecache.leases.reader import Held, ReaderLease
from imagecache.oci.reference import parse_reference
from imagecache.store.base import Store
from imagecache.store.memory import MemoryStore

NOW = Wishes(Policy(min_age=0, grace=0), delete_many=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory, images: list[str]) -> MemoryStore:
    """Two images, and the name of the second is gone."""
    store = built_realm(tmp_path_factory.mktemp("realm"), images)

    async def drop() -> None:
        catalog = Catalog(store, "default")
        name = alias_name(parse_reference(images[1]))
        await catalog.drop_alias(await catalog.alias(name))

    asyncio.run(drop())
    return store


async def collect(store: Store, wishes: Wishes = NOW) -> CollectReport:
    return await Collector(Catalog(store, "default"), wishes).run()


async def collect_all(store: Store, runs: int = 8) -> list[CollectReport]:
    return [await collect(store) for _ in range(runs)]


async def test_dropped_image_goes_and_the_named_one_stays_whole(realm: MemoryStore) -> None:
    """Invariants 1-5 on a real realm; what remains is the living image alone."""
    store = copied(realm)
    before = sum(map(len, store.objects.values()))
    reports = await collect_all(store)
    assert await broken(store) == (1, [])
    assert sum(report.deleted_bytes for report in reports) > before // 4
    packs = [key for key in store.objects if "/packs/" in key]
    catalog = Catalog(store, "default")
    named = {pack async for root in catalog.roots() for pack in root.packs}
    assert {catalog.keys.pack(bytes.fromhex(name)) for name in named} == set(packs)
    assert not any(report.problems for report in reports)


async def test_dry_run_prints_what_the_run_deletes(realm: MemoryStore) -> None:
    """K8: the same list, and a dry run writes nothing but the clock's probe."""
    store = copied(realm)
    compared = 0
    for _ in range(6):
        objects = dict(store.objects)
        dry = await collect(store, Wishes(NOW.policy, dry_run=True))
        assert {k for k in store.objects if k not in objects} <= {"v1/default/clock"}
        wet = await collect(store)
        assert dry.doomed == wet.doomed
        assert wet.deleted == len(wet.doomed)
        compared += len(wet.doomed)
    assert compared > 10


async def test_large_sweep_is_refused_until_said_twice(realm: MemoryStore) -> None:
    """K8: more than a fifth of the stored bytes needs --yes-delete-many."""
    store = copied(realm)
    with pytest.raises(Denied, match="yes-delete-many"):
        for _ in range(6):
            await collect(store, Wishes(NOW.policy))
    packs = {key for key in realm.objects if "/packs/" in key}
    assert packs <= set(store.objects)
    await collect_all(store)
    assert await broken(store) == (1, [])
    assert not packs <= set(store.objects)


async def test_clocks_that_differ_stop_it(realm: MemoryStore) -> None:
    """H8: a host two minutes off collects nothing."""
    store = copied(realm)
    catalog = Catalog(store, "default")
    for wrong in (-31_536_000.0, -125.0, 125.0, 31_536_000.0):
        with pytest.raises(Unsupported, match="clock"):
            await Collector(catalog, NOW, wall=lambda wrong=wrong: time.time() + wrong).run()


class Forgetful(MemoryStore):
    """Leaves a root out of every second listing (G6)."""

    lists = 0

    async def list(self, prefix: str):
        self.lists += 1
        async for stat in super().list(prefix):
            if "/roots/" in stat.key and prefix.endswith("roots/"):
                continue
            yield stat


async def test_doubtful_listings_stop_it(realm: MemoryStore) -> None:
    """G6, G7: two listings that disagree delete nothing."""
    store = Forgetful()
    store.objects, store._modified = dict(realm.objects), dict(realm._modified)
    with pytest.raises(Unavailable, match="listings"):
        await collect_all(store)
    kept = {key for key in realm.objects if "/leases/" not in key}
    assert kept <= set(store.objects)


async def test_unreadable_root_stops_it(realm: MemoryStore) -> None:
    """What nobody can read may rely on anything: nothing is guessed."""
    store = copied(realm)
    key = next(key for key in store.objects if "/roots/" in key)
    store.objects[key] = store.objects[key][:-20]
    with pytest.raises(Corrupt, match="nothing was deleted"):
        await collect(store)


async def test_frozen_collector_is_fenced(realm: MemoryStore) -> None:
    """G15: of two collectors the one that was overtaken stops at its next fence."""
    store = copied(realm)
    catalog = Catalog(store, "default")
    frozen = CollectorLease(catalog, StoreClock(catalog), holder="frozen")
    await frozen.acquire()
    store._modified[catalog.keys.collector_lease] -= 3600
    other = CollectorLease(catalog, StoreClock(catalog), holder="other")
    await other.acquire()
    with pytest.raises(LeaseLost):
        await frozen.fence()
    await other.fence()


async def second(store: Store, images: list[str]) -> tuple[Catalog, ImageKey, str]:
    catalog = Catalog(store, "default")
    named = {alias.image for alias in await catalog.aliases()}
    async for root in catalog.roots():
        if root.image not in named:
            key = ImageKey(root.image, Face.EROFS, canonical_options({}))
            return catalog, key, root.image
    raise AssertionError


async def test_pinned_and_exported_images_stay(realm: MemoryStore, images: list[str]) -> None:
    """A pin and a reader's lease each keep an image that has no name."""
    for how in ("pin", "read"):
        store = copied(realm)
        catalog, key, image = await second(store, images)
        root = await catalog.find_root(key)
        if how == "pin":
            await pin(catalog, root, "kept", 3600)
        else:
            lease = ReaderLease(catalog)
            held = [Held(image, root.generation, root.packs)]
            assert await lease.hold(held) == []
        litter = f"{catalog.keys.packs(1)}{'0' * 64}"
        await store.put(litter, b"left by a killed build")
        await collect_all(store)
        assert litter not in store.objects
        assert await broken(store) == (2, [])
        if how == "read":
            assert await lease.renew() == held  # moved: to be looked up again
            await lease.hold([])
        else:
            await store.delete(catalog.keys.pin(image))
        await collect_all(store)
        assert await broken(store) == (1, [])


async def crash_everywhere(realm: MemoryStore, runs: int, every: int) -> int:
    """Kills a series of collections at every n-th write, before and after it."""
    quiet = CrashStore(copied(realm))
    await collect_all(quiet, runs)
    boundaries = quiet.writes
    for at in range(1, boundaries + 1, every):
        for after in (False, True):
            store = copied(realm)
            crashing = CrashStore(store, at, after)
            with pytest.raises(Crash):
                await collect_all(crashing, runs)
            shown, faults = await broken(store)
            assert not faults, (at, after, crashing.keys[-1])
            assert shown in (1, 2)
            for key in [key for key in store.objects if key.endswith("collector.json")]:
                del store.objects[key]  # its time would have run out
            await collect_all(store, runs + 3)
            assert await broken(store) == (1, []), (at, after, crashing.keys[-1])
    return boundaries


async def test_crash_at_writes_of_a_collection(realm: MemoryStore) -> None:
    """G14: whatever is killed, the store is whole after it, and the next runs converge.

    Every fifth write; the soak tier takes them all.
    """
    assert await crash_everywhere(realm, 4, 5) > 60


@pytest.mark.soak
async def test_crash_at_every_write_of_a_collection_soak(realm: MemoryStore) -> None:
    """G14: every write boundary, once before and once after it."""
    await crash_everywhere(realm, 4, 1)


async def test_crash_at_every_write_of_a_build(images: list[str], tmp_path: Path) -> None:
    """A build killed at each write leaves nothing readable that is not whole, and is resumed."""
    quiet = CrashStore(MemoryStore())
    wanted = (await build(quiet, tmp_path / "quiet", images[0])).block_image
    boundaries = quiet.writes
    assert boundaries > 10
    for at in range(1, boundaries + 1):
        store = MemoryStore()
        crashing = CrashStore(store, at, after=at % 2 == 0)
        with pytest.raises(Crash):
            await build(crashing, tmp_path / "spool", images[0])
        shown, faults = await broken(store)
        assert not faults and shown <= 1, crashing.keys[-1]
        for key in [key for key in store.objects if "/leases/" in key]:
            del store.objects[key]  # its time would have run out
        assert (await build(store, tmp_path / "spool", images[0])).block_image == wanted
        assert await broken(store) == (1, []), crashing.keys[-1]


async def test_generations_end_deleted(realm: MemoryStore) -> None:
    """Invariant 3 and 5: each generation goes through all states, and ends with nothing in it."""
    store = copied(realm)
    reports = await collect_all(store, 10)
    states = [state for report in reports for state in report.states]
    catalog = Catalog(store, "default")
    gone = [g.number for g in await catalog.generations() if g.state is State.DELETED]
    assert gone
    for number in gone:
        words = [s.split()[1] for s in states if s.split()[0] == str(number)]
        assert words == ["active", "retired", "closing", "expired", "deleted"][-len(words) :]
        assert not any(key.startswith(catalog.keys.within(number)) for key in store.objects)
