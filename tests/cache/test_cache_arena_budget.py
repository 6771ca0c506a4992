"""The arena's budget, leases, upkeep and host limits. Rows H7-H9 and H12."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kits.cachearena import SMALL, chunk, fill, present, stocked
from kits.until import until

from imagecache.cache.arena import Arena
from imagecache.cache.settings import ArenaSettings
from imagecache.cache.slotfile import SLOT_BYTES, SlotFile
from imagecache.cache.upkeep import scrub_once
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.errors import CubecacheError


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
    await until(lambda: not arena.stats().leased, "the end of the lease")
    for _ in range(4):  # chunks that come back push out those that nobody uses any more
        for number in range(2000, 2400):
            if not arena.holds(chunk_digest(chunk(number))):
                await fill(arena, range(number, number + 1))
    assert await present(arena, range(4)) == 0
    await arena.close()


async def test_a_chunk_admitted_twice_at_once_stays_within_the_budget(tmp_path: Path) -> None:
    """H7: two callers admit the same chunks into a full arena: the second copies are let go."""
    arena = await Arena.open(tmp_path, SMALL)
    for number in range(20):
        await fill(arena, range(number * 100, number * 100 + 60), blocks=64 - number * 3)
        blocks = 1 + number * 3
        some = [chunk(10_000 + number * 10 + n, blocks) for n in range(6)]
        batch = [(chunk_digest(data), data) for data in some]
        both = await asyncio.gather(
            arena.admit(batch + batch, ahead=True), arena.admit(batch[::-1], ahead=False)
        )
        assert both[0] == 6
        arena.table.check()
        assert arena.stats().used_bytes <= SMALL.budget_bytes
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
    # Nothing but holes: the scrub has begun to find that out.
    await until(lambda: arena.stats().checked or arena.stats().quarantined, "the scrub's begin")
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
    await until(lambda: not arena.stats().unchecked, "the end of the first checks")
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


NO_ADDRESS_SPACE = """
import asyncio, resource, sys
from pathlib import Path
from imagecache.cache.arena import Arena
from imagecache.cache.settings import ArenaSettings
from imagecache.errors import Unavailable

resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
try:
    asyncio.run(Arena.open(Path(sys.argv[1]), ArenaSettings(64 << 30)))
except Unavailable as error:
    print(error.message, "/", error.remedy)
"""


async def test_no_address_space_is_a_typed_refusal(tmp_path: Path) -> None:
    """H12: too little address space for the map: refused by name, with the remedy.

    In a process of its own: under a limit that a large test process has passed already, Python
    cannot even start a thread, and waits for it for ever.
    """
    child = subprocess.run(
        [sys.executable, "-c", NO_ADDRESS_SPACE, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "cannot map" in child.stdout
    assert "budget" in child.stdout
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
    await until(lambda: arena.holds(chunk_digest(data)), "the cancelled admission's chunk")
    assert await present(arena, range(1, 2)) == 1
    await arena.close()
