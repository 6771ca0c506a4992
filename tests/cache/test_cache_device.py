"""The device: right bytes at any offset, from the map, from copies, and while things go wrong."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random

import pytest
from kits.until import soon, until

from imagecache.cache.device import LOCAL_CONTEXT, errno_of, zeros
from imagecache.cache.events import Cause, Wait
from imagecache.cache.settings import Integrity
from imagecache.cache.slotfile import SLOT_BYTES
from imagecache.chunks import BLOCK
from imagecache.errors import Corrupt, CubecacheError, NoSpace, Unavailable, UsageError
from nbdserver.device import BASE_ALLOCATION, DeviceError

POLICIES = [Integrity.ADMISSION, Integrity.EVERY_READ]


class Watch:
    """A recorder."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int, bool]]] = []
        self.waits: list[Wait] = []

    def reads(self, batch) -> None:
        self.batches.append(list(batch))

    def waited(self, wait: Wait) -> None:
        self.waits.append(wait)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(4))
async def test_any_range_reads_as_the_image(bench, policy: Integrity, seed: int) -> None:
    b = await bench(integrity=policy)
    image = b.image(seed=seed, chunks=30)
    device = b.device(image)
    rng = random.Random(seed)
    ranges = [(0, 1), (device.size - 1, 1), (0, device.size), (0, 0), (device.size, 0)]
    for _ in range(300):
        at = rng.randrange(device.size)
        ranges.append((at, min(rng.choice([1, 511, 4096, 70_000, 600_000]), device.size - at)))
    for _ in range(2):
        for at, length in ranges:
            found = device.try_read(at, length)
            if found is None:
                found = await device.read(at, length)
            assert b"".join(found) == image.read(at, length)
        assert await device.read_copied(*ranges[2]) == image.content
        b.arena.table.check()


async def test_reads_outside_the_disk_are_refused(bench) -> None:
    """F1: the device defends itself; the server has validated before."""
    b = await bench()
    device = b.device(b.image(chunks=2))
    for at, length in [(device.size, 1), (0, device.size + 1), (-1, 1), (1 << 70, 1)]:
        with pytest.raises(DeviceError) as caught:
            await device.read(at, length)
        assert caught.value.errno == errno.EINVAL


async def test_a_position_ends_with_its_slot(bench) -> None:
    """H7: the cache is smaller than the working set: evicted chunks are never shown for others."""
    b = await bench(budget_bytes=2 << 20)
    image = b.image(chunks=60, blocks=32)
    device = b.device(image)
    rng = random.Random(4)
    for _ in range(1500):
        at = rng.randrange(device.size - 5000)
        found = device.try_read(at, 5000) or await device.read(at, 5000)
        assert b"".join(found) == image.read(at, 5000)
    assert b.arena.stats().evicted > 200
    assert b.arena.stats().used_bytes <= 2 << 20


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_cache_that_holds_nothing_still_reads(bench, policy: Integrity) -> None:
    """H7: smaller than one chunk: everything is passed through, many readers, no livelock."""
    b = await bench(budget_bytes=0, integrity=policy)
    image = b.image(chunks=20)
    devices = [b.device(image) for _ in range(8)]

    async def reader(device, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            at = rng.randrange(device.size)
            length = min(400_000, device.size - at)
            assert b"".join(await device.read(at, length)) == image.read(at, length)

    await asyncio.wait_for(asyncio.gather(*(reader(d, n) for n, d in enumerate(devices))), 60)
    assert b.arena.stats().chunks == 0


async def test_pins_hold_what_views_show(bench) -> None:
    """H7: views of a pinned range keep their bytes while the cache turns over."""
    b = await bench(budget_bytes=2 << 20)
    image, other = b.image(seed=1, chunks=4, blocks=32), b.image(seed=2, chunks=60, blocks=32)
    device, rival = b.device(image), b.device(other)
    await device.read(0, device.size)
    length = 40 * BLOCK
    await b.settled()
    views = device.try_read(0, length)
    release = device.pin(0, length)
    for at in range(0, rival.size, 100_000):
        await rival.read(at, min(100_000, rival.size - at))
    assert b"".join(views) == image.read(0, length)
    assert b.arena.stats().pinned > 0
    release()
    release()
    assert b.arena.stats().pinned == 0


async def test_zeros_cost_no_memory(bench) -> None:
    buffers = zeros((64 << 20) + 5)
    assert sum(map(len, buffers)) == (64 << 20) + 5
    assert len({id(buffer.obj) for buffer in buffers}) == 1
    assert not any(buffers[-1])


async def test_extents_tell_holes_and_what_is_here(bench) -> None:
    """F25: extents add up, are never empty, and merge; the local context follows the cache."""
    b = await bench()
    image = b.image(seed=3, chunks=20)
    device = b.device(image, read_ahead=False)
    rng = random.Random(1)
    ranges = [(0, device.size), (device.size - 1, 1), (5, 1)]
    ranges += [(a, rng.randint(1, device.size - a)) for a in rng.sample(range(device.size), 50)]
    for context in (BASE_ALLOCATION, LOCAL_CONTEXT):
        for at, length in ranges:
            found = await device.extents(context, at, length, one=False)
            assert sum(extent.length for extent in found) == length
            assert all(extent.length > 0 for extent in found)
            assert all(x.flags != y.flags for x, y in itertools.pairwise(found))
            (first,) = await device.extents(context, at, length, one=True)
            assert first == found[0]
    at = 0
    for extent in await device.extents(BASE_ALLOCATION, 0, device.size, one=False):
        piece = image.read(at, extent.length)
        blocks = {piece[n : n + BLOCK] == bytes(BLOCK) for n in range(0, len(piece), BLOCK)}
        assert blocks == {bool(extent.flags)}
        at += extent.length
    assert len(await device.extents(LOCAL_CONTEXT, 0, device.size, one=False)) > 1
    await device.read(0, device.size)
    await b.settled()
    (all_here,) = await device.extents(LOCAL_CONTEXT, 0, device.size, one=False)
    assert all_here.flags == 1


async def test_cache_is_accepted_at_once_and_bounded(bench) -> None:
    """F32: CACHE of the whole export returns at once, and asks for a bounded part."""
    b = await bench()
    image = b.image(chunks=1100, blocks=1, holes=False)
    device = b.device(image)
    await device.cache(0, device.size)
    assert not b.reader.reads
    assert sum(b.fetcher.queued) == 1024
    await until(lambda: b.arena.stats().chunks >= 1024, "1,024 chunks")
    assert device.try_read(0, 100 * BLOCK) is not None


async def test_waits_are_recorded_with_their_cause(bench) -> None:
    b = await bench()
    image = b.image(chunks=8, blocks=16, packs=1, holes=False)
    watch = Watch()
    size = 16 * BLOCK
    device = b.device(image, recorder=watch, read_ahead=False)
    b.reader.delay = 0.02
    await asyncio.gather(device.read(0, 10), device.read(20, 10))
    device.observe([(0, 10, False), (20, 10, False)])
    await b.settled()
    b.reader.gate = asyncio.Event()
    b.fetcher.request(image.map(), [2], 1)
    late = asyncio.ensure_future(device.read(2 * size, 10))
    await asyncio.sleep(0.01)
    b.reader.gate.set()
    await late
    await b.settled()
    slot = b.arena.table.find(image.map().digest(0))
    await device.read_copied(0, 10)
    os.pwrite(b.arena.file.fd, b"rot", slot * SLOT_BYTES)
    b.arena.table.distrust_all()
    await device.read(2 * size, 10)
    await device.read(0, 10)
    b.reader.away = True
    b.patience(0.6)
    with pytest.raises(DeviceError):
        await device.read(5 * size, 10)
    causes = [wait.cause for wait in watch.waits]
    assert causes == [
        Cause.COLD,
        Cause.JOINED,
        Cause.LATE,
        Cause.COPY,
        Cause.FIRST_USE,
        Cause.ROT,
        Cause.COLD,
    ]
    assert "the store is away" in watch.waits[-1].error
    assert watch.waits[0].seconds >= 0.02
    assert (watch.waits[2].offset, watch.waits[2].length, watch.waits[2].chunks) == (
        2 * size,
        10,
        1,
    )
    assert watch.batches == [[(0, 10, False), (20, 10, False)]]


async def test_read_ahead_runs_in_front_of_a_stream_and_not_of_random_reads(bench) -> None:
    b = await bench()
    image = b.image(chunks=200, blocks=32, packs=1, holes=False)
    device = b.device(image)
    for at in range(0, device.size, 65536):
        if device.try_read(at, 65536) is None:
            await device.read(at, 65536)
        await asyncio.sleep(0)
    gets = [count.gets for count in b.fetcher.counters.by_class]
    assert gets[0] < 10
    assert gets[1] >= 5
    scattered = b.image(seed=9, chunks=200, blocks=32, packs=1, holes=False)
    device = b.device(scattered)
    before = b.fetcher.counters.by_class[1].gets
    for n in random.Random(2).sample(range(0, 200, 4), 50):
        await device.read(n * 32 * BLOCK, 4096)
    assert b.fetcher.counters.by_class[1].gets == before


async def test_a_closed_export_says_so(bench) -> None:
    """F34: reads that come after the close are ESHUTDOWN."""
    b = await bench()
    device = b.device(b.image(chunks=2))
    await device.close()
    with pytest.raises(DeviceError) as caught:
        await device.read(0, 1)
    assert caught.value.errno == errno.ESHUTDOWN


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (Corrupt("x"), errno.EIO),
        (Unavailable("x"), errno.EIO),
        (CubecacheError("x"), errno.EIO),
        (NoSpace("x"), errno.ENOSPC),
        (UsageError("x"), errno.EINVAL),
    ],
)
def test_the_errno_table(error: CubecacheError, number: int) -> None:
    assert errno_of(error) == number


async def test_rot_under_read_copied_is_healed(bench) -> None:
    """H1: after EFAULT the server asks for a copy: it is compared, and fetched where it is bad."""
    b = await bench()
    image = b.image(chunks=6, holes=False)
    device = b.device(image)
    await device.read(0, device.size)
    await b.settled()
    os.truncate(b.directory / "slots", 0)
    assert await device.read_copied(0, device.size) == image.content
    assert b.arena.stats().quarantined > 0
    assert await device.read_copied(0, device.size) == image.content
    assert b"".join(await device.read(0, device.size)) == image.content


async def vandal(b, rng: random.Random, rounds: int) -> int:
    """Flips bits, swaps slots and truncates the arena's file; how often."""
    size = b.arena.file.size
    fd = b.arena.file.fd
    for n in range(rounds):
        slots = b.arena.table.present_slots()
        if slots:
            kind = rng.random()
            slot = rng.choice(slots)
            if kind < 0.9:
                at = slot * SLOT_BYTES + rng.randrange(b.arena.table.blocks[slot] * BLOCK)
                byte = os.pread(fd, 1, at)
                if byte:
                    os.pwrite(fd, bytes([byte[0] ^ 1 << rng.randrange(8)]), at)
            elif kind < 0.97:
                other = rng.choice(slots)
                first = os.pread(fd, SLOT_BYTES, slot * SLOT_BYTES)
                second = os.pread(fd, SLOT_BYTES, other * SLOT_BYTES)
                os.pwrite(fd, second, slot * SLOT_BYTES)
                os.pwrite(fd, first, other * SLOT_BYTES)
            else:
                os.truncate(fd, rng.randrange(size))
        await asyncio.sleep(0.001 if n % 8 == 0 else 0)
    return rounds


async def vandalised(bench, rounds: int, seed: int) -> None:
    print(f"seed {seed}")
    b = await bench(integrity=Integrity.EVERY_READ, budget_bytes=4 << 20)
    image = b.image(seed=seed, chunks=40, blocks=16)
    devices = [b.device(image) for _ in range(4)]
    done = False

    async def reader(device, rng: random.Random) -> int:
        count = 0
        while not done:
            at = rng.randrange(device.size)
            length = min(rng.choice([512, 4096, 90_000]), device.size - at)
            found = device.try_read(at, length) or await device.read(at, length)
            assert b"".join(found) == image.read(at, length)
            count += 1
            if count % 5 == 0:
                await asyncio.sleep(0)
        return count

    readers = [
        asyncio.ensure_future(reader(device, random.Random(seed + n)))
        for n, device in enumerate(devices)
    ]
    await vandal(b, random.Random(seed), rounds)
    done = True
    counts = await soon(asyncio.gather(*readers))
    b.arena.table.check()
    stats = b.arena.stats()
    print(f"{rounds} strokes, {sum(counts)} reads, {stats.quarantined} quarantined, 0 wrong bytes")
    assert stats.quarantined > 0
    assert await devices[0].read_copied(0, image.map().size_bytes) == image.content


async def test_every_read_survives_vandalism(bench) -> None:
    """H1: flips, swaps and truncations under load with `every-read`: no wrong byte, all healed."""
    await vandalised(bench, 600, random.SystemRandom().randrange(1 << 30))


@pytest.mark.soak
async def test_every_read_survives_ten_thousand_strokes(bench) -> None:
    """H1: 10,000 flips, swaps and truncations under load: 0 wrong bytes, all healed."""
    await vandalised(bench, 10_000, random.SystemRandom().randrange(1 << 30))


async def vandalised_between_runs(bench, runs: int, strokes: int) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    b = await bench()
    image = b.image(seed=seed, chunks=40, blocks=16)
    for _ in range(runs):
        device = b.device(image)
        for at in range(0, device.size, 200_000):
            length = min(200_000, device.size - at)
            assert b"".join(await device.read(at, length)) == image.read(at, length)
        await b.settled()
        await vandal(b, rng, strokes)
        b = await bench()
        assert b.arena.stats().chunks > 0
    assert await b.device(image).read_copied(0, len(image.content)) == image.content
    print(f"{runs * strokes} strokes between {runs} runs, 0 wrong bytes")


async def test_admission_survives_vandalism_between_runs(bench) -> None:
    """H1: with `admission`, the same between restarts: no wrong byte, all healed."""
    await vandalised_between_runs(bench, 6, 40)


@pytest.mark.soak
async def test_admission_survives_ten_thousand_strokes_between_runs(bench) -> None:
    """H1: 10,000 flips, swaps and truncations between 100 runs: 0 wrong bytes, all healed."""
    await vandalised_between_runs(bench, 100, 100)


async def test_a_filled_image_outlives_the_store(bench) -> None:
    """The store is gone and the daemon restarts: what is here is served without an error."""
    b = await bench()
    image = b.image(chunks=30)
    await b.device(image).read(0, len(image.content))
    b.reader.away = True
    b = await bench()
    device = b.device(image)
    assert b"".join(await device.read(0, device.size)) == image.content
    assert len(b.device(image).try_read(0, device.size)) > 0
