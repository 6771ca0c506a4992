"""The local cache of sealed objects: verified, bounded, and good enough while the store is away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imagecache.blockimage.envelope import seal
from imagecache.cache.objects import ObjectCache
from imagecache.errors import Corrupt, LimitExceeded, NotFound, Unavailable
from imagecache.store.faults import FaultStore, Script
from imagecache.store.memory import MemoryStore


@pytest.fixture
async def parts(tmp_path: Path):
    store = MemoryStore()
    name, sealed = seal(b"a block manifest" * 1000)
    await store.put("v1/x", sealed)
    cache = ObjectCache(tmp_path / "objects", store)
    yield store, cache, name, tmp_path / "objects" / name.hex()
    await cache.close()


async def test_kept_and_served_while_the_store_is_away(parts) -> None:
    store, cache, name, _ = parts
    assert await cache.get("v1/x", name) == b"a block manifest" * 1000
    cache._store = FaultStore(store, Script("e" * 9))
    assert await cache.get("v1/x", name) == b"a block manifest" * 1000
    assert (cache.hits, cache.misses) == (1, 1)
    with pytest.raises(Unavailable):
        await cache.get("v1/y", bytes(32))


async def test_an_object_that_nobody_has(parts) -> None:
    _, cache, _, _ = parts
    with pytest.raises(NotFound):
        await cache.get("v1/none", bytes(32))


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "directory", "link", "fifo", "grown"])
async def test_a_damaged_copy_is_fetched_again(parts, tmp_path: Path, how: str) -> None:
    """H1: a damaged, replaced or linked copy is never believed nor followed."""
    _, cache, name, path = parts
    right = await cache.get("v1/x", name)
    secret = tmp_path / "secret"
    secret.write_bytes(path.read_bytes())
    if how == "flip":
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
    elif how == "grown":
        os.truncate(path, 1 << 20)
    elif how in ("truncate", "empty"):
        os.truncate(path, 0 if how == "empty" else 30)
    else:
        path.unlink()
        if how == "directory":
            path.mkdir()
        elif how == "link":
            path.symlink_to(secret)
        else:
            os.mkfifo(path)
    assert await cache.get("v1/x", name) == right
    fetched = 1 if how == "grown" else 2  # bytes behind the sealed ones do not count
    assert cache.misses == fetched
    assert await cache.get("v1/x", name) == right
    assert cache.misses == fetched
    assert path.is_file()
    assert not path.is_symlink()


async def test_a_wrong_object_in_the_store(parts) -> None:
    store, cache, name, path = parts
    store.objects["v1/x"] = seal(b"another")[1]
    with pytest.raises(Corrupt):
        await cache.get("v1/x", name)
    assert not path.exists()


async def test_limits_and_budget(tmp_path: Path) -> None:
    store = MemoryStore()
    cache = ObjectCache(tmp_path, store, budget_bytes=5000)
    names = []
    for n in range(10):
        name, sealed = seal(os.urandom(1000))
        names.append(name)
        await store.put(f"v1/{n}", sealed)
        await cache.get(f"v1/{n}", name)
        os.utime(tmp_path / name.hex(), (n, n))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000
    assert (tmp_path / names[9].hex()).exists()
    assert not (tmp_path / names[0].hex()).exists()
    with pytest.raises(LimitExceeded):
        await cache.get("v1/0", names[0], limit=999)
    await cache.close()


async def test_a_directory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """H3: the object is there all the same when it cannot be kept."""
    store = MemoryStore()
    (tmp_path / "file").write_text("not a directory")
    cache = ObjectCache(tmp_path / "file", store)
    name, sealed = seal(b"x" * 100)
    await store.put("v1/x", sealed)
    assert await cache.get("v1/x", name) == b"x" * 100
    await cache.close()
