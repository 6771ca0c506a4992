"""Re-packing: mostly dead packs give way, killed anywhere, and no identity notices."""

from __future__ import annotations

from pathlib import Path

import pytest
from imagemaker.entries import Entry, directory
from kits.image import write_image
from kits.realm import FAST, Crash, CrashStore, broken, build, copied, noise

from imagecache.catalog import Catalog
from imagecache.collect.plan import Policy
from imagecache.collect.repack import Repacker, RepackReport, sparse_packs
from imagecache.collect.run import Collector, Wishes
from imagecache.leases.build import BuildLeases
from imagecache.sealedwith import named_tables
from imagecache.store.base import Store
from imagecache.store.memory import MemoryReader, MemoryStore


def large(seed: int, count: int) -> list[Entry]:
    files = [Entry(f"d/{n}", content=noise(seed * 100 + n, 1_200_000)) for n in range(count)]
    return [directory("d"), *files]


@pytest.fixture
async def realm(tmp_path: Path) -> MemoryStore:
    """A second version reuses one file of eight of the first, whose name then goes."""
    store = MemoryStore()
    first, second = large(1, 8), large(2, 2)
    second[1] = first[3]
    references = [
        write_image(tmp_path / "image" / name, [entries])
        for name, entries in (("first", first), ("second", second))
    ]
    where = tmp_path / "image" / "app"
    for reference in references:
        source = Path(reference.removeprefix("oci:").rpartition(":")[0])
        if where.exists():
            where.unlink()
        where.symlink_to(source)  # two versions under one name: the second reuses the first
        await build(store, tmp_path / "spool", f"oci:{where}:latest")
    return store


async def repacked(store: Store, inner: MemoryStore, scratch: Path) -> RepackReport:
    catalog = Catalog(store, "default")
    sparse = await sparse_packs(catalog, await named_tables(catalog), 0.5)
    return await Repacker(
        catalog,
        MemoryReader(inner),
        scratch=scratch,
        wanted=lambda place: place.pack in sparse,
        leases=BuildLeases(catalog, times=FAST),
    ).run()


async def collect(store: MemoryStore, runs: int = 10) -> None:
    for _ in range(runs):
        wishes = Wishes(Policy(0, 0), delete_many=True)
        await Collector(Catalog(store, "default"), wishes).run()


def packed(store: MemoryStore) -> int:
    return sum(len(body) for key, body in store.objects.items() if "/packs/" in key)


async def test_mostly_dead_packs_are_freed(realm: MemoryStore, tmp_path: Path) -> None:
    """Without re-packing one living file keeps a whole pack for ever."""
    await collect(realm)
    assert (await broken(realm)) == (1, [])
    held = packed(realm)
    images = {root.block_image async for root in Catalog(realm, "default").roots()}
    report = await repacked(realm, realm, tmp_path / "scratch")
    assert (len(report.images), report.failed) == (1, {})
    assert 1_000_000 < report.moved_bytes < 2_000_000
    assert (await broken(realm)) == (1, [])
    await collect(realm)
    assert (await broken(realm)) == (1, [])
    assert packed(realm) < held / 2
    assert {root.block_image async for root in Catalog(realm, "default").roots()} == images
    assert not (await repacked(realm, realm, tmp_path / "scratch")).images
    assert not (tmp_path / "scratch").exists()


async def test_a_killed_repack_loses_nothing(realm: MemoryStore, tmp_path: Path) -> None:
    """G14: at each write, before it or after it."""
    await collect(realm)
    quiet = CrashStore(copied(realm))
    await repacked(quiet, quiet.inner, tmp_path / "scratch")  # type: ignore[arg-type] # a memory store
    assert quiet.writes > 4
    for at in range(1, quiet.writes + 1):
        store = copied(realm)
        with pytest.raises(Crash):
            await repacked(CrashStore(store, at, after=at % 2 == 0), store, tmp_path / "scratch")
        assert await broken(store) == (1, []), at
        for key in [key for key in store.objects if "/leases/" in key]:
            del store.objects[key]  # its time would have run out
        assert not (await repacked(store, store, tmp_path / "scratch")).failed
        await collect(store)
        assert await broken(store) == (1, []), at
