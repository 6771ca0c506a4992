"""The arena on disk: damage, restarts, full disks, locks. Rows H of the catalogue."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from imagecache.cache.arena import Arena
from imagecache.cache.index import SCHEMA
from imagecache.cache.settings import ArenaSettings
from imagecache.cache.slotfile import SLOT_BYTES, SlotFile
from imagecache.cache.upkeep import scrub_once
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.errors import Busy, CubecacheError, Unavailable, Unsupported

SMALL = ArenaSettings(budget_bytes=16 << 20, scrub_bytes_per_second=0, retry_seconds=0.05)


def chunk(number: int, blocks: int = 16) -> bytes:
    return random.Random(number).randbytes(blocks * BLOCK)


async def fill(arena: Arena, numbers: range, blocks: int = 16) -> None:
    for number in numbers:
        data = chunk(number, blocks)
        assert await arena.admit([(chunk_digest(data), data)], ahead=False) == 1


async def present(arena: Arena, numbers: range, blocks: int = 16) -> int:
    """How many chunks are read back right; a wrong byte fails the test."""
    right = 0
    for number in numbers:
        data = chunk(number, blocks)
        copy = await arena.copy(chunk_digest(data))
        assert copy in (None, data)
        right += copy is not None
    arena.table.check()
    return right


async def stocked(directory: Path, count: int = 20, settings: ArenaSettings = SMALL) -> None:
    arena = await Arena.open(directory, settings)
    await fill(arena, range(count))
    await arena.close()


async def test_a_restart_keeps_chunks_and_trusts_none(tmp_path: Path) -> None:
    await stocked(tmp_path)
    arena = await Arena.open(tmp_path, SMALL)
    digest = chunk_digest(chunk(3))
    assert arena.holds(digest)
    assert arena.table.checked(digest) == -1
    assert arena.stats().unchecked == 20
    assert await present(arena, range(20)) == 20
    assert arena.stats().unchecked == 0
    assert arena.table.checked(digest) >= 0
    await arena.close()
    await arena.close()


async def test_a_flipped_bit_is_found_dropped_and_fetched_again(tmp_path: Path) -> None:
    """H1: a flipped bit is found before it is shown, and the evidence is kept."""
    await stocked(tmp_path)
    with (tmp_path / "slots").open("r+b") as file:
        for slot in (2, 5):
            file.seek(slot * SLOT_BYTES + 777)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
    arena = await Arena.open(tmp_path, SMALL)
    assert await present(arena, range(20)) == 18
    assert arena.stats().quarantined == 2
    missing = [n for n in range(20) if not arena.holds(chunk_digest(chunk(n)))]
    await fill(arena, range(missing[0], missing[0] + 1))
    assert await present(arena, range(20)) == 19
    await arena.close()
    rows = sqlite3.connect(tmp_path / "index.db").execute("SELECT reason FROM quarantine")
    assert [reason for (reason,) in rows] == ["its bytes do not match its digest"] * 2


async def test_two_slots_swapped(tmp_path: Path) -> None:
    """H1: two slots swapped on disk."""
    await stocked(tmp_path)
    with (tmp_path / "slots").open("r+b") as file:
        first = os.pread(file.fileno(), SLOT_BYTES, 0)
        second = os.pread(file.fileno(), SLOT_BYTES, 7 * SLOT_BYTES)
        os.pwrite(file.fileno(), second, 0)
        os.pwrite(file.fileno(), first, 7 * SLOT_BYTES)
    arena = await Arena.open(tmp_path, SMALL)
    assert await present(arena, range(20)) == 18
    await arena.close()


@pytest.mark.parametrize("size", [0, 1, 5 * SLOT_BYTES + 9000, SMALL.slot_count * SLOT_BYTES * 2])
async def test_a_file_of_another_size(tmp_path: Path, size: int) -> None:
    """H1: truncated, emptied or extended between two runs."""
    await stocked(tmp_path)
    os.truncate(tmp_path / "slots", size)
    arena = await Arena.open(tmp_path, SMALL)
    whole = min(size // SLOT_BYTES, 20)
    assert await present(arena, range(20)) == whole
    await fill(arena, range(100, 120))
    assert await present(arena, range(100, 120)) == 20
    assert (tmp_path / "slots").stat().st_size == SMALL.slot_count * SLOT_BYTES
    await arena.close()


async def test_truncated_while_running(tmp_path: Path) -> None:
    """H1: truncated while running: an error of one read at most, and nothing is trusted after."""
    arena = await Arena.open(tmp_path, SMALL)
    await fill(arena, range(20))
    serial = arena.table.serials[19]
    os.truncate(tmp_path / "slots", 3 * SLOT_BYTES)
    assert await arena.copy(chunk_digest(chunk(10))) is None
    assert arena.table.serials[19] != serial
    assert await present(arena, range(20)) == 3
    await fill(arena, range(200, 210))
    assert await present(arena, range(200, 210)) == 10
    os.truncate(tmp_path / "slots", 0)
    await fill(arena, range(300, 301))  # the next write notices as well
    assert await present(arena, range(200, 210)) == 0
    await arena.close()


@pytest.mark.parametrize("what", ["directory", "link", "fifo", "second name", "dangling link"])
@pytest.mark.parametrize("name", ["slots", "index.db"])
async def test_something_else_in_a_files_place(tmp_path: Path, name: str, what: str) -> None:
    """H1: a directory, a link, a FIFO or a hard link in a file's place: set aside, not followed."""
    arena_dir = tmp_path / "arena"
    await stocked(arena_dir)
    secret = tmp_path / "shadow"
    secret.write_bytes(b"root:secret" * 1000)
    before = secret.read_bytes()
    path = arena_dir / name
    path.unlink()
    if what == "directory":
        path.mkdir()
        (path / "x").write_text("kept")
    elif what == "link":
        path.symlink_to(secret)
    elif what == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.hardlink_to(secret)
    arena = await Arena.open(arena_dir, SMALL)
    while name != "slots" and arena.stats().chunks < 20:
        await asyncio.sleep(0.001)
    kept = await present(arena, range(20))
    assert kept == (0 if name == "slots" else 20)  # the slots alone are evidence enough
    await fill(arena, range(50, 60))
    assert await present(arena, range(50, 60)) == 10
    await arena.close()
    assert secret.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()
    assert path.is_file()
    assert any(arena_dir.glob(f"{name}.aside-*"))


async def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H1: an unreadable file is set aside; as root nothing is unreadable, so open() says so."""
    await stocked(tmp_path)
    real, refused = os.open, []

    def refuse_once(path: object, flags: int, *rest: int, **more: int) -> int:
        if str(path).endswith("slots") and not refused:
            refused.append(path)
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse_once)
    arena = await Arena.open(tmp_path, SMALL)
    assert refused
    assert await present(arena, range(20)) == 0
    await arena.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
async def test_a_disk_that_refuses_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """H3: full, over quota, read-only or failing: passed through, flagged, and tried again."""
    arena = await Arena.open(tmp_path, replace(SMALL, retry_seconds=3600))
    await fill(arena, range(10))
    real = SlotFile.write

    def refuse(self: SlotFile, slot: int, plaintext: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(SlotFile, "write", refuse)
    data = chunk(99)
    assert await arena.admit([(chunk_digest(data), data)], ahead=False) == 0
    assert os.strerror(number) in (arena.stats().degraded or "")
    assert not arena.holds(chunk_digest(data))
    assert await present(arena, range(10)) == 10
    monkeypatch.setattr(SlotFile, "write", real)
    assert await arena.admit([(chunk_digest(data), data)], ahead=False) == 0  # not yet tried
    arena._retry_at = 0.0  # an hour later
    assert await arena.admit([(chunk_digest(data), data)], ahead=False) == 1
    assert arena.stats().degraded is None
    assert await present(arena, range(99, 100)) == 1
    await arena.close()


async def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """H3: a real refusal of the kernel's: writing beyond RLIMIT_FSIZE."""
    script = f"""
import asyncio, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path.cwd())!r})
from imagecache.cache.arena import Arena
from imagecache.cache.settings import ArenaSettings
from imagecache.chunks import chunk_digest
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
async def main():
    arena = await Arena.open(Path({str(tmp_path)!r}), ArenaSettings(16 << 20))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    kept = 0
    for n in range(12):
        data = bytes([n + 1]) * (256 << 10)
        kept += await arena.admit([(chunk_digest(data), data)], ahead=False)
    print(kept, arena.stats().degraded)
    await arena.close()
asyncio.run(main())
"""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "4 the disk refuses writes: File too large"


async def test_a_bad_sector_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H3: EIO on reading a slot: that chunk is missing, the slot is left alone, all else works."""
    arena = await Arena.open(tmp_path, SMALL)
    await fill(arena, range(10))
    bad = arena.table.find(chunk_digest(chunk(4)))
    real = SlotFile.read

    def read(self: SlotFile, slot: int, length: int) -> bytes:
        if slot == bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, slot, length)

    monkeypatch.setattr(SlotFile, "read", read)
    assert await present(arena, range(10)) == 9
    await fill(arena, range(20, 400), blocks=8)
    assert bad not in arena.table.present_slots()
    await arena.close()


async def test_the_directory_is_deleted_while_running(tmp_path: Path) -> None:
    """H4: the directory disappears: what is here is served, what comes is kept or passed on."""
    directory = tmp_path / "arena"
    arena = await Arena.open(directory, SMALL)
    await fill(arena, range(10))
    await asyncio.to_thread(subprocess.run, ["rm", "-r", str(directory)], check=True)
    assert await present(arena, range(10)) == 10
    await fill(arena, range(10, 15))
    assert await present(arena, range(15)) == 15
    await asyncio.sleep(0.4)
    await arena.close()
    again = await Arena.open(directory, SMALL)
    assert again.stats().chunks == 0
    await fill(again, range(3))
    assert await present(again, range(3)) == 3
    await again.close()


async def test_a_second_daemon_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    """H5: two daemons on one directory: the second names the first and touches nothing."""
    script = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(Path.cwd())!r})
from imagecache.cache.arena import Arena
async def main():
    arena = await Arena.open(Path({str(tmp_path)!r}))
    print("ready", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    first = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE
    )
    assert await first.stdout.readline() == b"ready\n"
    with pytest.raises(Busy, match=rf"process {first.pid}\b"):
        await Arena.open(tmp_path, SMALL)
    first.kill()
    await first.wait()
    arena = await Arena.open(tmp_path, SMALL)
    await arena.close()


async def test_the_lock_can_be_passed_on(tmp_path: Path) -> None:
    """H5: a successor that was given the descriptor holds the lock without a gap."""
    arena = await Arena.open(tmp_path, SMALL)
    passed = os.dup(arena.lock_fd)
    await arena.close()
    with pytest.raises(Busy):
        await Arena.open(tmp_path, SMALL)
    successor = await Arena.open(tmp_path, SMALL, lock_fd=passed)
    with pytest.raises(Busy, match=str(os.getpid())):
        await Arena.open(tmp_path, SMALL)
    await successor.close()
    await (await Arena.open(tmp_path, SMALL)).close()


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
    while arena.stats().chunks < 20:
        await asyncio.sleep(0.01)
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
    while arena.stats().chunks < 20:
        await asyncio.sleep(0.01)
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


async def test_a_chunk_in_use_is_not_evicted(tmp_path: Path) -> None:
    """H7: pinned chunks stay while the cache turns over many times; the rest makes room."""
    arena = await Arena.open(tmp_path, SMALL)
    await fill(arena, range(4))
    slots = [arena.table.find(chunk_digest(chunk(n))) for n in range(4)]
    for slot in slots:
        arena.table.pin(slot)
    view = [bytes(arena.view[s * SLOT_BYTES : s * SLOT_BYTES + 16 * BLOCK]) for s in slots]
    await fill(arena, range(1000, 2000))
    assert arena.stats().evicted > 500
    assert arena.stats().used_bytes <= SMALL.budget_bytes
    assert view == [chunk(n) for n in range(4)]
    assert await present(arena, range(4)) == 4
    for slot in slots:
        arena.table.unpin(slot)
    await fill(arena, range(3000, 4000))
    assert await present(arena, range(4)) == 0
    await arena.close()


async def test_a_dropped_slot_waits_for_its_last_pin(tmp_path: Path) -> None:
    """H7: a slot whose chunk was refused while it is being sent is not given to another chunk."""
    arena = await Arena.open(tmp_path, SMALL)
    await fill(arena, range(1))
    digest = chunk_digest(chunk(0))
    slot = arena.table.find(digest)
    arena.table.pin(slot)
    os.pwrite(arena.file.fd, b"rot", slot * SLOT_BYTES)
    assert await arena.copy(digest) is None
    await fill(arena, range(10, 100))
    assert slot not in arena.table.present_slots()
    arena.table.unpin(slot)
    arena.table.check()
    await fill(arena, range(100, 130))
    await arena.close()


@pytest.mark.parametrize("budget", [0, BLOCK, 15 * BLOCK])
async def test_a_cache_smaller_than_a_chunk(tmp_path: Path, budget: int) -> None:
    """H7: a cache smaller than one chunk works, by passing everything through."""
    arena = await Arena.open(tmp_path, ArenaSettings(budget))
    data = chunk(1)
    assert await arena.admit([(chunk_digest(data), data)], ahead=False) == 0
    assert await arena.copy(chunk_digest(data)) is None
    assert arena.stats().degraded is None
    arena.table.check()
    await arena.close()


async def test_the_budget_is_what_the_disk_holds(tmp_path: Path) -> None:
    arena = await Arena.open(tmp_path, SMALL)
    rng = random.Random(3)
    for number in range(600):
        data = chunk(number, rng.randint(1, 64))
        await arena.admit([(chunk_digest(data), data)], ahead=False)
    arena.table.check()
    os.fsync(arena.file.fd)
    assert arena.stats().used_bytes <= SMALL.budget_bytes
    assert arena.file.disk_bytes() <= SMALL.budget_bytes + (1 << 20)  # the file system's own blocks
    await arena.close()


async def test_a_smaller_budget_after_a_restart(tmp_path: Path) -> None:
    await stocked(tmp_path, 60)
    small = ArenaSettings(budget_bytes=1 << 20, scrub_bytes_per_second=0)
    arena = await Arena.open(tmp_path, small)
    assert arena.stats().used_bytes <= 1 << 20
    assert await present(arena, range(60)) == 16
    assert arena.file.disk_bytes() <= 2 << 20
    await arena.close()


async def test_leases_keep_what_is_not_yet_there_and_run_out(tmp_path: Path) -> None:
    arena = await Arena.open(tmp_path, SMALL)
    lease = arena.lease(chunk_digest(chunk(n)) for n in range(4))
    await fill(arena, range(4))
    await fill(arena, range(1000, 1600))
    assert await present(arena, range(4)) == 4
    arena.lease([chunk_digest(chunk(0))], seconds=0.01)
    lease.release()
    lease.release()
    while arena.stats().leased:
        await asyncio.sleep(0.01)
    for _ in range(4):  # chunks that come back push out those that nobody uses any more
        for number in range(2000, 2400):
            if not arena.holds(chunk_digest(chunk(number))):
                await fill(arena, range(number, number + 1))
    assert await present(arena, range(4)) == 0
    await arena.close()


async def test_clock_jumps_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H8: the wall clock jumps a year both ways: nothing is evicted, no lease ends."""
    arena = await Arena.open(tmp_path, SMALL)
    arena.lease([chunk_digest(chunk(0))], seconds=3600)
    await fill(arena, range(20))
    now = time.time()
    for jump in (365 * 86400, -365 * 86400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        await fill(arena, range(50 + jump // 86400, 55 + jump // 86400))
        assert await present(arena, range(20)) == 20
    assert arena.stats().evicted == 0
    assert arena.stats().leased == 1
    await arena.close()


@pytest.mark.soak
async def test_a_million_chunks_are_ready_in_five_seconds(tmp_path: Path) -> None:
    """H9: an index of 10^6 chunks: ready in under 5 s (printed), checked in the background."""
    large = ArenaSettings(budget_bytes=256 << 30)
    await (await Arena.open(tmp_path, large)).close()
    with sqlite3.connect(tmp_path / "index.db") as db:
        db.executemany(
            "INSERT INTO chunks VALUES (?, ?, ?)", ((n, os.urandom(32), 64) for n in range(10**6))
        )
    begin = time.monotonic()
    arena = await Arena.open(tmp_path, large)
    print(f"10^6 chunks: ready in {time.monotonic() - begin:.2f} s")
    assert arena.stats().chunks == 10**6
    while not arena.stats().checked and not arena.stats().quarantined:
        await asyncio.sleep(0.05)  # nothing but holes: the scrub has begun to find that out
    await arena.close()


async def test_the_scrub_finds_rot_nobody_reads(tmp_path: Path) -> None:
    arena = await Arena.open(tmp_path, SMALL)
    await fill(arena, range(20))
    slot = arena.table.find(chunk_digest(chunk(7)))
    os.pwrite(arena.file.fd, b"rot", slot * SLOT_BYTES + 30000)
    await scrub_once(arena)
    assert arena.stats().quarantined == 1
    assert arena.stats().chunks == 19
    assert await present(arena, range(20)) == 19
    await arena.close()


async def test_background_checking_after_a_restart(tmp_path: Path) -> None:
    """H9: what an earlier run left is compared with its digests without anybody's asking."""
    await stocked(tmp_path)
    arena = await Arena.open(tmp_path, ArenaSettings(16 << 20, scrub_bytes_per_second=1 << 20))
    while arena.stats().unchecked:
        await asyncio.sleep(0.01)
    assert arena.stats().checked == 20
    await arena.close()


async def test_leftovers_of_slots_nobody_names_are_given_back(tmp_path: Path) -> None:
    """H2: bytes that were written and never named are reclaimed at the next start."""
    await stocked(tmp_path, 5)
    with (tmp_path / "slots").open("r+b") as file:
        for slot in (2, 9, 40):
            file.seek(slot * SLOT_BYTES)
            file.write(chunk(slot, 64))
    with sqlite3.connect(tmp_path / "index.db") as db:
        db.execute("DELETE FROM chunks WHERE slot = 2")
    arena = await Arena.open(tmp_path, SMALL)
    assert arena.stats().chunks == 4
    assert arena.file.disk_bytes() <= 4 * 16 * BLOCK + 65536
    assert await present(arena, range(5)) == 4
    await arena.close()


@pytest.mark.parametrize(("limit", "value"), [(resource.RLIMIT_AS, 1 << 30)])
async def test_no_address_space_is_a_typed_refusal(tmp_path: Path, limit: int, value: int) -> None:
    """H12: too little address space for the map: refused by name, with the remedy."""
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        with pytest.raises(Unavailable, match="cannot map") as caught:
            await Arena.open(tmp_path, ArenaSettings(64 << 30))
    finally:
        resource.setrlimit(limit, before)
    assert "budget" in caught.value.remedy
    await (await Arena.open(tmp_path, SMALL)).close()


async def test_no_file_descriptors_is_a_typed_refusal(tmp_path: Path) -> None:
    """H12: the limit of open files is reached: refused by name, and works when there are some."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        with pytest.raises(CubecacheError):
            await Arena.open(tmp_path, SMALL)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    await (await Arena.open(tmp_path, SMALL)).close()


async def test_a_filesystem_that_cannot_punch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotFile, "punch_range", lambda self, offset, length: False)
    arena = await Arena.open(tmp_path, SMALL)
    await fill(arena, range(1000))
    assert arena.stats().used_bytes <= SMALL.budget_bytes
    assert arena.file.disk_bytes() <= SMALL.budget_bytes + (1 << 20)
    assert await present(arena, range(1000)) > 200
    await arena.close()


async def test_a_cancelled_admission_finishes_by_itself(tmp_path: Path) -> None:
    arena = await Arena.open(tmp_path, SMALL)
    data = chunk(1)
    task = asyncio.ensure_future(arena.admit([(chunk_digest(data), data)], ahead=False))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while not arena.holds(chunk_digest(data)):
        await asyncio.sleep(0.001)
    assert await present(arena, range(1, 2)) == 1
    await arena.close()
