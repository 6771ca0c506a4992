"""The arena on disk: damage, restarts, full disks, locks. Rows H of the catalogue."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from kits.cachearena import SMALL, chunk, fill, present, stocked
from kits.until import soon, until

from imagecache.cache.arena import Arena
from imagecache.cache.slotfile import SLOT_BYTES, SlotFile
from imagecache.chunks import chunk_digest
from imagecache.errors import Busy


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
    if name != "slots":
        await until(lambda: arena.stats().chunks >= 20, "20 chunks, found by their own bytes")
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
        subprocess.run,
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
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
    await asyncio.to_thread(subprocess.run, ["rm", "-r", str(directory)], check=True, timeout=60)
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
    assert await soon(first.stdout.readline()) == b"ready\n"
    with pytest.raises(Busy, match=rf"process {first.pid}\b"):
        await Arena.open(tmp_path, SMALL)
    first.kill()
    await soon(first.wait())
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
