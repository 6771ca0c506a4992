from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kits.store_contract import DEMAND, StoreContract, Subject

from imagecache.errors import Denied, NoSpace, Rejected, Unavailable
from imagecache.store import local_files
from imagecache.store.local import LocalReader, LocalStore


class TestLocalStore(StoreContract):
    @pytest.fixture
    async def subject(self, tmp_path: Path) -> AsyncIterator[Subject]:
        root = tmp_path / "store" / "deep"
        store, reader = LocalStore(root), LocalReader(root)

        async def seed(key: str, body: bytes) -> None:
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(body)

        async def peek(key: str) -> bytes | None:
            return (root / key).read_bytes() if (root / key).exists() else None

        yield Subject(store, reader, seed, peek)
        await store.close()
        await reader.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalStore]:
    opened = LocalStore(tmp_path / "store")
    yield opened
    await opened.close()


async def test_first_listing_of_a_new_store_is_empty(store: LocalStore) -> None:
    assert [stat async for stat in store.list("")] == []


async def test_a_vanished_root_is_not_an_empty_store(store: LocalStore) -> None:
    await store.put("r/x", b"x")
    store.root.rename(store.root.with_name("elsewhere"))
    with pytest.raises(Unavailable):
        await store.get("r/x", limit=1)
    with pytest.raises(Unavailable):
        [stat async for stat in store.list("r/")]


async def test_no_temp_stays_and_none_is_listed(store: LocalStore) -> None:
    await store.put("r/x", b"x")
    await store.put("r/x", b"y", only_if_absent=True)
    await store.put("r/z", b"y", only_if_absent=True)
    assert list((store.root / ".tmp").iterdir()) == []
    (store.root / ".tmp" / "leftover").write_bytes(b"")
    (store.root / "r" / ".nfs0001").write_bytes(b"")
    assert {stat.key async for stat in store.list("")} == {"r/x", "r/z"}


async def test_leftovers_are_reclaimed_by_age_and_lock(tmp_path: Path) -> None:
    """H2 for the store: temps of killed writers go, those of living ones and young ones stay."""
    temps = tmp_path / ".tmp"
    temps.mkdir()
    old = time.time() - 3600
    with local_files.locked_temp(temps) as (living, _):
        for name in ("dead", "young"):
            (temps / name).write_bytes(b"x")
        os.utime(temps / "dead", (old, old))
        os.utime(living, (old, old))
        (temps / "dir").mkdir()
        store = LocalStore(tmp_path)
        assert [stat async for stat in store.list("")] == []
        assert {path.name for path in temps.iterdir()} == {living.name, "young", "dir"}
        await store.close()


@pytest.mark.parametrize("kind", ["symlink", "fifo"])
async def test_foreign_things_are_not_followed(store: LocalStore, kind: str) -> None:
    """H1 for the store: a symlink or FIFO in an object's place is refused, nothing hangs."""
    await store.put("r/x", b"x")
    path = store.root / "r" / "odd"
    if kind == "symlink":
        path.symlink_to("/etc/passwd")
    else:
        os.mkfifo(path)
    reader = LocalReader(store.root)
    for call in (
        store.get("r/odd", limit=9999),
        store.stat("r/odd"),
        reader.read("r/odd", 0, 1, priority=DEMAND),
    ):
        with pytest.raises(Rejected, match="r/odd"):
            await call
    assert {stat.key async for stat in store.list("")} == {"r/x"}
    await reader.close()


async def test_a_key_below_or_above_an_object(store: LocalStore) -> None:
    await store.put("r/x", b"x")
    for once in (False, True):
        with pytest.raises(Rejected, match="r/x/y"):
            await store.put("r/x/y", b"", only_if_absent=once)
        with pytest.raises(Rejected, match="object r "):
            await store.put("r", b"", only_if_absent=once)


async def test_directories_removed_meanwhile_are_made_again(store: LocalStore) -> None:
    await store.put("r/d/x", b"x")
    await store.delete("r/d/x")
    (store.root / "r" / "d").rmdir()
    (store.root / ".tmp").rmdir()
    assert await store.put("r/d/y", b"y")


async def test_a_missing_source_names_the_file(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="no-such-file"):
        await store.put("r/x", tmp_path / "no-such-file")


async def test_a_full_disk(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """H3 for the store: no space is said so, and nothing is published or left."""
    await store.put("r/x", b"x")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_files.os, "fsync", full)
    with pytest.raises(NoSpace, match="free space"):
        await store.put("r/y", b"y")
    monkeypatch.undo()
    assert list((store.root / ".tmp").iterdir()) == []
    assert {stat.key async for stat in store.list("")} == {"r/x"}


async def test_refused_and_broken_disks(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.put("r/x", b"x")
    for number, kind in [(13, Denied), (30, Denied), (5, Unavailable), (116, Unavailable)]:

        def refuse(*args: object, number: int = number, **named: object) -> int:
            raise OSError(number, "injected")

        with monkeypatch.context() as patch:
            patch.setattr(local_files.os, "open", refuse)
            with pytest.raises(kind, match="r/x"):
                await store.get("r/x", limit=1)
