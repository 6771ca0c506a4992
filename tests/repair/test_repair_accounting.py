"""What a realm is told that it holds: sums that agree with the objects, and what is shared."""

from __future__ import annotations

from pathlib import Path

import pytest
from kits.realm import built_realm, write_images

from imagecache.accounting import Accountant, ImageAccount, Prices, RealmAccount
from imagecache.catalog import Catalog
from imagecache.store.memory import MemoryStore


@pytest.fixture(scope="module")
def realm(tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    root: Path = tmp_path_factory.mktemp("realm")
    return built_realm(root, write_images(root))


async def test_shared_layer_counts_once(realm: MemoryStore) -> None:
    """Two images with a base in common: logical is the sum, unique counts the base once."""
    account = await Accountant(Catalog(realm, "default")).account()
    first, second = account.images
    assert account.logical_bytes == first.logical_bytes + second.logical_bytes
    shared = account.logical_bytes - account.unique_bytes
    assert shared > 300_000
    assert first.logical_bytes == first.alone_bytes + shared
    assert 1.3 < account.dedup < 1.5
    assert all(4 < image.requests < 12 for image in account.images)
    base = [layer for image in account.images for layer in image.layers if layer["images"] == 2]
    assert len(base) == 2
    assert all(layer["shared_bytes"] == layer["bytes"] for layer in base)


async def test_sums_are_those_of_the_objects(realm: MemoryStore) -> None:
    """Nothing is estimated: objects and bytes as the store has them, garbage told apart."""
    store = MemoryStore()
    store.objects, store._modified = dict(realm.objects), dict(realm._modified)
    before = await Accountant(Catalog(store, "default")).account()
    await store.put(f"v1/default/packs/00000001/{'0' * 64}", b"x" * 1000)
    await store.put("v1/other/packs/00000001/" + "0" * 64, b"y" * 5000)
    account = await Accountant(Catalog(store, "default")).account()
    own = [body for key, body in store.objects.items() if key.startswith("v1/default/")]
    assert (account.objects, account.stored_bytes) == (len(own), sum(map(len, own)))
    assert account.as_json()["garbage_pack_bytes"] == 1000
    assert before.as_json()["garbage_pack_bytes"] == 0
    assert (await Accountant(Catalog(store, "empty")).account()).objects == 0


@pytest.mark.quick
def test_cost_is_by_the_price_table() -> None:
    """A GiB a month at 2, and as much read once at 3 a GiB."""
    account = RealmAccount(stored_bytes=1 << 30, objects=2000)
    account.images = [ImageAccount("sha256:x", [], 0, 0, 0, requests=500)]
    assert account.cost(Prices(thousand_reads=4.0), 10)["read_month"] == 20.0
    cost = account.cost(Prices(gib_month=2.0, thousand_writes=0.5))
    assert cost == {"storage_month": 2.0, "written_once": 1.0, "read_month": 0.0}
