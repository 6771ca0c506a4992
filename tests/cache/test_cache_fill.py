"""Filling an image behind demand, through outages and through kill -9."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import signal
import sys
from pathlib import Path

from kits.until import soon, until

from imagecache.cache.arena import Arena
from imagecache.cache.fill import Fill, FillMode, FillState, default_mode
from imagecache.cache.settings import ArenaSettings
from imagecache.chunks import chunk_digest
from imagecache.store.base import Priority


async def test_a_whole_fill_is_few_large_gets(bench) -> None:
    b = await bench()
    image = b.image(chunks=120, blocks=64, packs=2)
    mapped = image.map()
    assert default_mode(mapped, b.arena) is FillMode.WHOLE
    fill = Fill(mapped, b.fetcher, mode=FillMode.WHOLE)
    assert fill.progress.state is FillState.IDLE
    fill.start()
    fill.start()
    done = await soon(fill.wait())
    assert (done.state, done.chunks, done.failed) == (FillState.DONE, 120, 0)
    assert done.bytes == done.bytes_total == mapped.stored_bytes
    assert len(b.reader.reads) < 12
    assert {read[3] for read in b.reader.reads} == {Priority.FILL}
    b.reader.away = True
    device = b.device(image)
    for at in range(0, device.size, 1 << 20):
        length = min(1 << 20, device.size - at)
        assert b"".join(device.try_read(at, length)) == image.read(at, length)
    await fill.stop()


async def test_hot_comes_first_and_none_brings_nothing(bench) -> None:
    b = await bench()
    image = b.image(chunks=40, blocks=8, packs=4, holes=False)
    mapped = image.map()
    none = Fill(mapped, b.fetcher, mode=FillMode.NONE)
    none.start()
    assert (await soon(none.wait())).chunks == 0
    hot = Fill(mapped, b.fetcher, mode=FillMode.HOT, hot=[33, 7, 8])
    hot.start()
    assert (await soon(hot.wait())).chunks == 3
    assert all(b.arena.holds(mapped.digest(n)) for n in (33, 7, 8))
    metadata = Fill(mapped, b.fetcher, mode=FillMode.HOT)
    metadata.start()
    assert (await soon(metadata.wait())).chunks == 1
    assert b.arena.holds(mapped.digest(0))
    assert not b.arena.holds(mapped.digest(1))


async def test_an_outage_pauses_a_fill(bench) -> None:
    b = await bench()
    image = b.image(chunks=40, blocks=8, packs=4)
    fill = Fill(image.map(), b.fetcher, mode=FillMode.WHOLE)
    b.reader.away = True
    fill.start()
    await until(lambda: fill.progress.state is FillState.WAITING, "the fill's pause")
    assert fill.progress.error == "the store is away"
    b.reader.away = False
    done = await soon(fill.wait())
    assert (done.state, done.chunks) == (FillState.DONE, 40)
    await fill.stop()


async def test_a_bad_chunk_does_not_stop_a_fill(bench) -> None:
    """G12: one chunk of the store is damaged: it is counted, the rest is filled."""
    b = await bench()
    image = b.image(chunks=40, blocks=8, packs=1, holes=False)
    place = image.locations.locate(20)
    key = image.map().pack_key(place.pack)
    body = bytearray(b.store.objects[key])
    body[place.offset + place.stored_length // 2] ^= 1
    b.store.objects[key] = bytes(body)
    fill = Fill(image.map(), b.fetcher, mode=FillMode.WHOLE)
    fill.start()
    done = await soon(fill.wait())
    assert (done.state, done.chunks, done.failed) == (FillState.DONE, 39, 1)
    assert chunk_digest(image.chunks[20]).hex() in (done.error or "") or done.error is None


async def test_a_fill_has_a_rate_and_demand_overtakes_it(bench) -> None:
    b = await bench()
    image = b.image(chunks=60, blocks=64, packs=1, holes=False)
    mapped = image.map()
    rate = mapped.stored_bytes // 600
    fill = Fill(mapped, b.fetcher, mode=FillMode.WHOLE, bytes_per_second=rate)
    fill.start()
    await until(lambda: fill.progress.chunks, "the first chunk of the fill")
    device = b.device(image, read_ahead=False)
    last = device.size - 4096
    assert b"".join(await device.read(last, 4096)) == image.read(last, 4096)
    assert fill.progress.state is FillState.RUNNING
    assert fill.progress.chunks < 60
    await fill.stop()
    assert fill.progress.state is FillState.STOPPED


async def test_a_fill_larger_than_the_cache_stops_without_churning(bench) -> None:
    """H7: an image larger than the cache: the fill ends when the cache is full."""
    b = await bench(budget_bytes=2 << 20)
    image = b.image(chunks=60, blocks=64, holes=False)
    mapped = image.map()
    assert default_mode(mapped, b.arena) is FillMode.HOT
    fill = Fill(mapped, b.fetcher, mode=FillMode.WHOLE)
    fill.start()
    done = await asyncio.wait_for(fill.wait(), 10)
    assert done.state is FillState.FULL
    assert b.arena.stats().evicted < 60
    device = b.device(image)
    assert b"".join(await device.read(0, 100)) == image.read(0, 100)
    await fill.stop()


async def test_a_filled_image_stays_while_another_is_scanned(bench) -> None:
    b = await bench(budget_bytes=8 << 20)
    kept = b.image(seed=1, chunks=20, blocks=64, holes=False)
    other = b.image(seed=2, chunks=60, blocks=64, holes=False)
    fill = Fill(kept.map(), b.fetcher, mode=FillMode.WHOLE)
    fill.start()
    await soon(fill.wait())
    scan = b.device(other)
    for at in range(0, scan.size, 1 << 20):
        await scan.read(at, min(1 << 20, scan.size - at))
    b.reader.away = True
    assert b"".join(b.device(kept).try_read(0, 20 * 64 * 4096)) == kept.content
    assert b.arena.leased_bytes > 0
    await fill.stop()
    assert b.arena.leased_bytes == 0


async def test_a_hundred_fills_of_one_image_are_one(bench) -> None:
    """A hundred exports fill one image: one of them asks, all hold, and any may go."""
    b = await bench(budget_bytes=8 << 20)
    image = b.image(chunks=60, blocks=16, holes=False)
    mapped = image.map()
    b.reader.gate = asyncio.Event()
    fills = [Fill(mapped, b.fetcher, mode=FillMode.WHOLE) for _ in range(100)]
    for fill in fills:
        fill.start()
    assert b.arena.leased_bytes == mapped.chunk_bytes
    await until(lambda: b.reader.reads, "the first read")
    await soon(fills[0].stop())  # the one that asks: another one goes on
    b.reader.gate.set()
    for fill in fills[1:]:
        done = await soon(fill.wait())
        assert (done.state, done.chunks, done.bytes) == (FillState.DONE, 60, mapped.stored_bytes)
    assert len(b.reader.reads) < 12
    late = Fill(mapped, b.fetcher, mode=FillMode.WHOLE)
    late.start()
    assert (await soon(late.wait())).state is FillState.DONE
    for fill in fills[1:]:
        await fill.stop()
    assert b.arena.leased_bytes == mapped.chunk_bytes
    await late.stop()
    assert b.arena.leased_bytes == 0
    again = Fill(mapped, b.fetcher, mode=FillMode.WHOLE)
    again.start()
    assert (await soon(again.wait())).chunks == 60
    await again.stop()


CHILD = """
import asyncio, pickle, sys
from pathlib import Path
rounds = int(sys.argv[2])
sys.path[:0] = sys.argv[3:]
from kits.cacheimage import KitReader
from imagecache.cache.arena import Arena
from imagecache.cache.fetch import Fetcher
from imagecache.cache.fill import Fill, FillMode
from imagecache.cache.settings import ArenaSettings

async def main(directory):
    image, store = pickle.loads((directory / "image").read_bytes())
    arena = await Arena.open(directory / "arena", ArenaSettings(4 << 20, scrub_bytes_per_second=0))
    fetcher = Fetcher(KitReader(store, delay=0.002), arena)
    for _ in range(rounds):
        fill = Fill(image.map(), fetcher, mode=FillMode.HOT, hot=range(image.map().chunk_count))
        fill.start()
        print("filling", flush=True)
        await fill.wait()
    print("at rest", flush=True)
    await asyncio.sleep(600)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_kill_9_during_a_fill(tmp_path: Path, bench) -> None:
    """H2: killed at random moments of filling and evicting: what is found is right."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    b = await bench()
    image = b.image(seed=seed, chunks=60, blocks=None)
    (tmp_path / "image").write_bytes(pickle.dumps((image, b.store)))
    paths = [str(Path.cwd()), str(Path(__file__).parent.parent)]
    directory = tmp_path / "arena-of-child"
    directory.mkdir()
    (directory / "image").write_bytes((tmp_path / "image").read_bytes())
    kept = 0
    for last in [False] * 7 + [True]:
        rounds = str(1 if last else 1_000_000)
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            CHILD,
            str(directory),
            rounds,
            *paths,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert await soon(child.stdout.readline()) == b"filling\n"
            await asyncio.sleep(rng.random() * 0.8)
            if last:  # a cache that turns over has an index that is behind; this one comes to rest
                assert await soon(child.stdout.readline()) == b"at rest\n"
                await asyncio.sleep(2)
        finally:
            os.kill(child.pid, signal.SIGKILL)
        await soon(child.wait())
        arena = await Arena.open(
            directory / "arena", ArenaSettings(4 << 20, scrub_bytes_per_second=0)
        )
        arena.table.check()
        for plain in image.chunks:
            copy = await arena.copy(chunk_digest(plain))
            assert copy in (None, plain)
            kept += copy is not None
        assert arena.file.disk_bytes() <= (4 << 20) + (1 << 20)
        arena.table.check()
        await arena.close()
    print(f"{kept} chunks found right after 8 kills")
    assert kept
