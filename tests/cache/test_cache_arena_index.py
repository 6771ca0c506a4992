"""The arena's index: lost, damaged, older, newer, locked (H6)."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest
from kits.cachearena import SMALL, fill, present, stocked
from kits.until import until

from imagecache.cache.arena import Arena
from imagecache.cache.index import SCHEMA
from imagecache.errors import Unsupported


def damage_index(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(random.Random(1).randbytes(20000))
    elif how == "torn":
        raw = bytearray(path.read_bytes())
        raw[4096:] = random.Random(2).randbytes(len(raw) - 4096)
        path.write_bytes(raw)
    elif how == "older":
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 0")
    elif how == "other tables":
        path.unlink()
        with sqlite3.connect(path) as db:
            db.execute(f"PRAGMA user_version = {SCHEMA}")
            db.execute("CREATE TABLE cats (name TEXT)")
    for name in ("-wal", "-shm"):
        path.with_name(path.name + name).unlink(missing_ok=True)


@pytest.mark.parametrize("how", ["gone", "empty", "garbage", "torn", "older", "other tables"])
async def test_a_lost_index_is_rebuilt_from_the_slots(tmp_path: Path, how: str) -> None:
    """H6: the index is lost in some way: every chunk is found again by its own bytes."""
    await stocked(tmp_path)
    damage_index(tmp_path / "index.db", how)
    arena = await Arena.open(tmp_path, SMALL)
    await until(lambda: arena.stats().chunks >= 20, "20 chunks, found by their own bytes")
    assert await present(arena, range(20)) == 20
    await fill(arena, range(20, 30))
    await arena.close()
    arena = await Arena.open(tmp_path, SMALL)
    assert await present(arena, range(30)) == 30
    await arena.close()


async def test_an_index_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    """H6: a newer schema is refused by name, and the lock is free again."""
    await stocked(tmp_path)
    with sqlite3.connect(tmp_path / "index.db") as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    before = (tmp_path / "index.db").read_bytes()
    for _ in range(2):
        with pytest.raises(Unsupported, match=f"version {SCHEMA + 1}"):
            await Arena.open(tmp_path, SMALL)
    assert (tmp_path / "index.db").read_bytes() == before


async def test_a_locked_index_is_replaced(tmp_path: Path) -> None:
    """H6: somebody holds the database locked: it is set aside and rebuilt."""
    await stocked(tmp_path)
    other = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    arena = await Arena.open(tmp_path, SMALL)
    await until(lambda: arena.stats().chunks >= 20, "20 chunks, found by their own bytes")
    assert await present(arena, range(20)) == 20
    await arena.close()
    other.close()


async def test_rows_that_cannot_be(tmp_path: Path) -> None:
    """H6: rows outside the file, of no size, or twice for one chunk are left out."""
    await stocked(tmp_path, 5)
    with sqlite3.connect(tmp_path / "index.db") as db:
        digest = db.execute("SELECT digest FROM chunks WHERE slot = 1").fetchone()[0]
        db.executemany(
            "INSERT INTO chunks VALUES (?, ?, ?)",
            [
                (-1, b"a" * 32, 1),
                (1 << 40, b"b" * 32, 1),
                (30, b"c" * 32, 0),
                (31, b"d" * 32, 65),
                (32, b"short", 1),
                (33, "text" * 8, 1),
                (34, digest, 16),
                (35, b"e" * 32, "many"),
            ],
        )
    arena = await Arena.open(tmp_path, SMALL)
    assert arena.stats().chunks == 5
    assert await present(arena, range(5)) == 5
    await arena.close()
