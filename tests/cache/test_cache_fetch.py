"""The fetcher: one flight per chunk, few GETs, demand first, and every fetch ends."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from imagecache.cache.flight import Stage
from imagecache.chunks import BLOCK
from imagecache.errors import Denied, Unavailable
from imagecache.store.base import Priority
from imagecache.store.faults import FaultReader, Script
from imagecache.store.memory import MemoryReader
from nbdserver.device import DeviceError

DEMAND, PREFETCH, FILL = Priority


async def turns() -> None:
    """Some turns of the loop: what needs no waiting has happened."""
    for _ in range(10):
        await asyncio.sleep(0)


async def whole(device, image) -> None:
    """Reads the disk in pieces of odd sizes, and compares every byte."""
    rng, at = random.Random(1), 0
    while at < device.size:
        length = min(rng.randint(1, 700_000), device.size - at)
        assert b"".join(await device.read(at, length)) == image.read(at, length)
        at += length


async def test_a_herd_on_one_chunk_is_one_get(bench) -> None:
    """500 readers of one cold chunk: one GET, and all have the same bytes."""
    b = await bench()
    b.reader.delay = 0.05
    image = b.image(chunks=1, blocks=64, holes=False)
    device = b.device(image)
    reads = [device.read(n % 64 * BLOCK, BLOCK) for n in range(500)]
    found = await asyncio.gather(*reads)
    assert all(b"".join(f) == image.read(n % 64 * BLOCK, BLOCK) for n, f in enumerate(found))
    assert len(b.reader.reads) == 1
    assert b.fetcher.counters.joins == 499
    await b.settled()
    assert device.try_read(0, 8192) is not None


async def test_a_herd_that_comes_while_the_arena_is_still_writing(bench) -> None:
    b = await bench()
    image = b.image(chunks=1, blocks=64, holes=False)
    devices = [b.device(image) for _ in range(3)]
    admit, gate = b.arena.admit, asyncio.Event()

    async def slow(*chunks, **how):
        await gate.wait()
        return await admit(*chunks, **how)

    b.arena.admit = slow
    assert b"".join(await devices[0].read(0, 100)) == image.read(0, 100)
    assert devices[1].try_read(0, 100) is None
    assert b"".join(await devices[1].read(0, 100)) == image.read(0, 100)
    gate.set()
    await b.settled()
    assert devices[2].try_read(0, 100) is not None
    assert len(b.reader.reads) == 1


async def test_two_images_share_a_chunk(bench) -> None:
    b = await bench()
    first = b.image(seed=1, chunks=4, holes=False)
    second = b.image(seed=2, chunks=4, holes=False, shared=first.chunks[:2])
    await whole(b.device(first), first)
    fetched = sum(count.chunks for count in b.fetcher.counters.by_class)
    await whole(b.device(second), second)
    assert sum(count.chunks for count in b.fetcher.counters.by_class) == fetched + 2


async def test_neighbouring_misses_come_in_one_get(bench) -> None:
    """Misses of one request, and of requests that come in one turn of the loop, are one GET."""
    b = await bench()
    image = b.image(chunks=12, blocks=16, packs=1, holes=False)
    device = b.device(image, read_ahead=False)
    size = 16 * BLOCK
    assert b"".join(await device.read(0, 4 * size)) == image.read(0, 4 * size)
    assert len(b.reader.reads) == 1
    await asyncio.gather(*(device.read(n * size, 100) for n in (5, 4, 7, 6)))
    assert len(b.reader.reads) == 2
    stored = [image.locations.stored_lengths[n] for n in range(8)]
    assert sum(read[2] for read in b.reader.reads) == sum(stored)


async def test_demand_overtakes_and_upgrades(bench) -> None:
    """Demand goes ahead of what is queued; a queued flight that is demanded becomes demand."""
    b = await bench(fetch=replace((await bench()).fetcher.settings, prefetch_gets=1, fill_gets=1))
    image = b.image(chunks=60, blocks=64, packs=60, holes=False)
    mapped = image.map()
    b.reader.gate = asyncio.Event()
    fills = b.fetcher.request(mapped, range(0, 30), FILL)
    ahead = b.fetcher.request(mapped, range(30, 50), PREFETCH)
    await turns()
    assert [read[3] for read in b.reader.reads] == [PREFETCH]  # no fill while prefetches wait
    demand = b.fetcher.request(mapped, [29, 49, 55], DEMAND)
    await turns()
    assert [read[3] for read in b.reader.reads] == [PREFETCH, DEMAND, DEMAND, DEMAND]
    assert b.fetcher.counters.upgrades == 2
    b.reader.gate.set()
    await b.fetcher.wait(flight for flight, _ in demand)
    assert all(flight.stage is Stage.LANDED for flight, _ in demand)
    assert sum(flight.stage is Stage.LANDED for flight, _ in fills) <= 2
    await b.fetcher.wait_kept(flight for flight, _ in fills + ahead)
    assert b.arena.stats().chunks == 51
    assert len(b.reader.reads) == 51


async def test_a_fetch_outlives_its_first_reader(bench) -> None:
    b = await bench()
    image = b.image(chunks=1, blocks=8, holes=False)
    device = b.device(image)
    b.reader.gate = asyncio.Event()
    first = asyncio.ensure_future(device.read(0, 10))
    await turns()
    second = asyncio.ensure_future(device.read(0, 10))
    first.cancel()
    await turns()
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    b.reader.gate.set()
    await b.settled()
    assert device.try_read(0, 10) is not None
    assert len(b.reader.reads) == 1


async def test_an_away_store_is_eio_after_the_deadline_and_nothing_sticks(bench) -> None:
    """F30: the store is dead: a read waits as long as it may, then EIO; the next is afresh."""
    b = await bench()
    image = b.image(chunks=3, blocks=8, holes=False)
    device = b.device(image)
    b.reader.away = True
    b.patience(0.6)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    with pytest.raises(DeviceError) as caught:
        await device.read(0, 4096)
    assert caught.value.errno == 5
    assert loop.time() - begin > 0.3
    assert len(b.reader.reads) > 3  # it was asked again meanwhile
    b.reader.away = False
    b.patience(30)
    assert b"".join(await device.read(0, 4096)) == image.read(0, 4096)
    assert device.counters.errors == 1


async def test_a_store_that_comes_back_in_time_is_only_slow(bench) -> None:
    """F30: back before the deadline: the read that waited is answered."""
    b = await bench()
    image = b.image(chunks=3, blocks=8, holes=False)
    device = b.device(image)
    b.reader.away = True
    reading = asyncio.ensure_future(device.read(100, 4096))
    await asyncio.sleep(0.2)
    b.reader.away = False
    assert b"".join(await reading) == image.read(100, 4096)


async def test_a_store_that_never_answers(bench) -> None:
    """F30: black-holed: EIO after the deadline; when it answers again, reads do."""
    b = await bench()
    image = b.image(chunks=3, blocks=8, holes=False)
    device = b.device(image)
    b.reader.hang = True
    b.patience(0.6)
    with pytest.raises(DeviceError) as caught:
        await device.read(0, 4096)
    assert caught.value.errno == 5
    b.reader.hang = False
    b.patience(30)
    assert b"".join(await device.read(0, 4096)) == image.read(0, 4096)


async def test_wrong_bytes_are_asked_for_once_more(bench) -> None:
    """F31: a chunk comes wrong once: it is asked for past the tier, and the guest sees nothing."""
    b = await bench()
    image = b.image(chunks=4, blocks=16, packs=1, holes=False)
    device = b.device(image)
    b.reader.spoil = 1
    await whole(device, image)
    assert b.fetcher.counters.corrupt_bodies == b.fetcher.counters.repaired == 1
    assert len(b.reader.condemned) == 1


async def test_wrong_bytes_twice_are_eio_for_that_read_alone(bench) -> None:
    """F31: wrong again: EIO, counted, never shown; neighbours and the next read are fine."""
    b = await bench()
    image = b.image(chunks=3, blocks=8, packs=3, holes=False)
    device = b.device(image, read_ahead=False)
    b.reader.spoil = 2
    with pytest.raises(DeviceError) as caught:
        await device.read(0, 4096)
    assert caught.value.errno == 5
    assert "digest" in str(caught.value) or "damaged" in str(caught.value)
    assert device.try_read(0, 4096) is None
    assert b.fetcher.counters.corrupt_bodies == 1
    assert b"".join(await device.read(9 * BLOCK, 4096)) == image.read(9 * BLOCK, 4096)
    assert b"".join(await device.read(0, 4096)) == image.read(0, 4096)


def damage(b, image, how: str) -> None:
    """Breaks the middle chunk of a pack of three, in the store."""
    place = image.locations.locate(1)
    key = image.map().pack_key(place.pack)
    body = bytearray(b.store.objects[key])
    at = slice(place.offset, place.offset + place.stored_length)
    other = image.locations.locate(2)
    if how == "flip":
        body[place.offset + 40] ^= 0x10
    elif how == "swap":
        piece = body[other.offset : other.offset + place.stored_length]
        body[at] = piece.ljust(place.stored_length, b"\0")
    elif how == "zeros":
        body[at] = bytes(place.stored_length)
    elif how == "truncated":
        del body[place.offset + 10 :]
    elif how == "empty":
        body = bytearray()
    b.store.objects[key] = bytes(body)


@pytest.mark.parametrize("how", ["flip", "swap", "zeros", "truncated", "empty"])
async def test_a_damaged_pack(bench, how: str) -> None:
    """G12: a flipped, swapped, truncated or empty object: never shown, and right once repaired."""
    b = await bench()
    image = b.image(chunks=3, blocks=16, packs=1, holes=False)
    device = b.device(image, read_ahead=False)
    key = image.map().pack_key(image.locations.packs[0])
    right = b.store.objects[key]
    damage(b, image, how)
    b.patience(30 if how in ("flip", "swap", "zeros") else 0.6)
    with pytest.raises(DeviceError) as caught:
        await device.read(16 * BLOCK, 4096)
    assert caught.value.errno == 5
    b.patience(30)
    assert b.arena.stats().chunks <= 2
    if how not in ("truncated", "empty"):
        assert b"".join(await device.read(0, 4096)) == image.read(0, 4096)
    b.store.objects[key] = right
    await whole(device, image)


@pytest.mark.parametrize("letter", "etnpfxs0l")
async def test_scripted_faults_never_show_wrong_bytes(bench, letter: str) -> None:
    """F31, G12: every scripted fault, on every third read: right bytes or EIO, then right bytes."""
    b = await bench()
    image = b.image(chunks=12, packs=4)
    b.fetcher._reader = FaultReader(MemoryReader(b.store), Script((".." + letter) * 40))
    device = b.device(image)
    for at in range(0, device.size, 300_000):
        length = min(300_000, device.size - at)
        for _ in range(20):
            try:
                found = b"".join(await device.read(at, length))
            except DeviceError as error:
                assert error.errno == 5
            else:
                assert found == image.read(at, length)
                break
        else:
            pytest.fail(f"{at} could not be read")


async def test_an_unexpected_exception_of_a_reader_is_one_reads_error(bench, caplog) -> None:
    b = await bench()
    image = b.image(chunks=2, blocks=8, holes=False)
    device = b.device(image)

    class Broken:
        async def read(self, *args, **how):
            raise ZeroDivisionError("bug")

    good, b.fetcher._reader = b.fetcher._reader, Broken()
    b.patience(0.3)
    with pytest.raises(DeviceError):
        await device.read(0, 10)
    b.fetcher._reader = good
    b.patience(30)
    assert b"".join(await device.read(0, 10)) == image.read(0, 10)
    assert "ZeroDivisionError" in caplog.text


async def test_denied_is_told_at_once(bench) -> None:
    b = await bench()
    image = b.image(chunks=2, blocks=8, holes=False)
    b.fetcher._reader = FaultReader(MemoryReader(b.store), Script("d" * 10))
    with pytest.raises(DeviceError) as caught:
        await b.device(image).read(0, 10)
    assert isinstance(caught.value.__cause__, Denied)


async def test_what_is_asked_ahead_is_bounded(bench) -> None:
    """F32: queued prefetches have a cap; what is beyond is dropped and counted."""
    b = await bench(fetch=replace((await bench()).fetcher.settings, max_queued_ahead=10))
    image = b.image(chunks=50, blocks=1, holes=False)
    wanted = b.fetcher.request(image.map(), range(50), PREFETCH)
    assert len(wanted) == 10
    assert b.fetcher.counters.dropped_ahead == 40
    await b.fetcher.wait_kept(flight for flight, _ in wanted)
    await b.fetcher.prefetch(image.map(), range(50))
    assert b.arena.stats().chunks == 50


async def test_closing_ends_every_flight(bench) -> None:
    b = await bench()
    image = b.image(chunks=40, blocks=8, packs=40, holes=False)
    b.reader.hang = True
    mapped = image.map()
    wanted = b.fetcher.request(mapped, range(40), DEMAND)
    await turns()
    await b.fetcher.close()
    await b.fetcher.close()
    assert all(isinstance(flight.error, Unavailable) for flight, _ in wanted)
    late = b.fetcher.request(mapped, [0], DEMAND)
    assert isinstance(late[0][0].error, Unavailable)


async def test_a_key_that_is_not_configured(bench) -> None:
    b = await bench()
    image = b.image(chunks=2, blocks=8, holes=False)
    image.locations = replace(image.locations, key_ids=b"\1\1")
    with pytest.raises(DeviceError) as caught:
        await b.device(image).read(0, 10)
    assert isinstance(caught.value.__cause__, Denied)
    assert "secret 1" in str(caught.value)
