"""A boot pack's stream: visible as it arrives, overtaken by demand, and never needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from kits.cacheimage import KitImage, KitReader, make_image

from imagecache.cache.arena import Arena
from imagecache.cache.device import open_device
from imagecache.cache.events import Cause, Wait
from imagecache.cache.fetch import Fetcher
from imagecache.cache.image import ImageMap
from imagecache.cache.settings import ArenaSettings
from imagecache.cache.stream import BootStream, StreamOutcome, is_far
from imagecache.chunks import BLOCK
from imagecache.chunks.codec import ChunkEncoder
from imagecache.errors import Unavailable
from imagecache.packs.pack import PackedChunk, PackWriter
from imagecache.store.base import Priority
from imagecache.store.memory import MemoryStore


@dataclass
class Streamer:
    """Sends one object in pieces, each when it is let."""

    body: bytes
    piece: int = 64 << 10
    asked: list[tuple[int, int]] = field(default_factory=list)
    gate: asyncio.Semaphore | None = None  # one piece per release
    break_after: int | None = None

    async def stream(self, key: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        self.asked.append((offset, length))
        sent = 0
        while sent < length:
            if self.gate is not None:
                await self.gate.acquire()
            else:
                await asyncio.sleep(0)
            if self.break_after is not None and sent >= self.break_after:
                raise Unavailable("the line broke")
            piece = self.body[offset + sent : offset + min(length, sent + self.piece)]
            sent += len(piece)
            yield piece


@dataclass
class Waits:
    found: list[Wait] = field(default_factory=list)

    def reads(self, batch) -> None: ...

    def waited(self, wait: Wait) -> None:
        self.found.append(wait)


@dataclass
class Host:
    """A host's cache before a store with one image, and a boot pack of some of its chunks."""

    image: KitImage
    map: ImageMap
    reader: KitReader
    arena: Arena
    fetcher: Fetcher
    streamer: Streamer
    places: list[tuple[int, PackedChunk]]

    def stream(self) -> asyncio.Task[StreamOutcome]:
        stream = BootStream(
            self.fetcher, self.streamer, self.map, key="k", pack=b"p" * 32, chunks=self.places
        )
        return asyncio.get_running_loop().create_task(stream.run())

    def offset_of(self, number: int) -> int:
        """Where on the disk a chunk of the pack begins."""
        ordinal = self.places[number][0]
        return self.map.starts[list(self.map.ordinals).index(ordinal)]


def boot_pack(image: KitImage, ordinals: list[int]) -> tuple[bytes, list[tuple[int, PackedChunk]]]:
    writer, encoder = PackWriter(), ChunkEncoder()
    body = bytearray(writer.start())
    for ordinal in ordinals:
        plain = image.chunks[ordinal]
        codec, stored = encoder.encode(plain)
        digest = image.manifest.chunks.digest(ordinal)
        body += writer.add(digest, stored, blocks=len(plain) // BLOCK, codec=int(codec))
    body += writer.finish()[0]
    return bytes(body), list(zip(ordinals, writer.entries, strict=True))


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    store = MemoryStore()
    reader = KitReader(store)
    image = make_image(store, seed=5, chunks=30, blocks=64, holes=False)
    arena = await Arena.open(
        tmp_path / "arena", ArenaSettings(budget_bytes=64 << 20, scrub_bytes_per_second=0)
    )
    fetcher = Fetcher(reader, arena)
    body, places = boot_pack(image, list(range(29, 4, -1)))
    yield Host(image, image.map(), reader, arena, fetcher, Streamer(body), places)
    await fetcher.close()
    arena.table.check()
    await arena.close()


async def test_all_chunks_come_by_one_get(host: Host) -> None:
    outcome = await host.stream()
    assert (outcome.chunks, outcome.left, outcome.error) == (25, 0, None)
    assert len(host.streamer.asked) == 1
    assert host.reader.reads == []
    assert all(host.arena.holds(host.map.digest(n)) for n, _ in host.places)


async def test_chunks_are_visible_before_the_stream_is_over(host: Host) -> None:
    """The guest reads the first chunks while the last ones are on their way."""
    host.streamer.gate = asyncio.Semaphore(0)
    task = host.stream()
    first = host.places[0][1].stored_length
    for _ in range(-(-(first + 8) // host.streamer.piece)):
        host.streamer.gate.release()
    async with asyncio.timeout(10):
        while not host.arena.holds(host.map.digest(host.places[0][0])):
            await asyncio.sleep(0.005)
    assert not task.done()
    assert not host.arena.holds(host.map.digest(host.places[-1][0]))
    for _ in range(1000):
        host.streamer.gate.release()
    assert (await task).left == 0


async def test_a_read_of_what_comes_soon_joins_the_stream(host: Host) -> None:
    waits = Waits()
    device = open_device(host.map, host.arena, host.fetcher, recorder=waits, read_ahead=False)
    host.streamer.gate = asyncio.Semaphore(0)
    host.fetcher.demand_seconds = 60.0
    task = host.stream()
    await asyncio.sleep(0)
    offset = host.offset_of(1)
    read = asyncio.ensure_future(device.read(offset, BLOCK))
    await asyncio.sleep(0.02)
    for _ in range(1000):
        host.streamer.gate.release()
    assert b"".join(bytes(x) for x in await read) == host.image.read(offset, BLOCK)
    await task
    assert host.reader.reads == []
    assert [wait.cause for wait in waits.found] == [Cause.LATE]


async def test_a_read_of_what_comes_late_overtakes_the_stream(host: Host) -> None:
    device = open_device(host.map, host.arena, host.fetcher, read_ahead=False)
    host.streamer.gate = asyncio.Semaphore(0)
    host.fetcher.demand_seconds = 0.001
    task = host.stream()
    await asyncio.sleep(0.01)
    offset = host.offset_of(24)
    async with asyncio.timeout(10):
        found = await device.read(offset, BLOCK)
    assert b"".join(bytes(x) for x in found) == host.image.read(offset, BLOCK)
    assert [priority for *_, priority in host.reader.reads] == [Priority.DEMAND]
    assert host.fetcher.counters.overtakes == 1
    for _ in range(1000):
        host.streamer.gate.release()
    outcome = await task
    assert (outcome.overtaken, outcome.error) == (1, None)


async def test_a_read_that_joined_is_not_left_with_a_stream_that_hangs(host: Host) -> None:
    device = open_device(host.map, host.arena, host.fetcher, read_ahead=False)
    host.streamer.gate = asyncio.Semaphore(0)
    host.fetcher.demand_seconds = 0.05
    task = host.stream()
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await device.read(host.offset_of(0), BLOCK)
    assert host.fetcher.counters.overtakes == 1
    host.streamer.break_after = 0
    host.streamer.gate.release()
    assert (await task).error is not None


async def test_a_stream_that_breaks_off_is_finished_by_ranged_reads(host: Host) -> None:
    host.streamer.break_after = 10 * host.streamer.piece
    outcome = await host.stream()
    assert outcome.error == "the line broke"
    assert outcome.left > 0
    assert host.reader.reads
    assert all(host.arena.holds(host.map.digest(n)) for n, _ in host.places)


async def test_a_stream_that_breaks_while_the_arena_writes_ends_all_its_flights(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had landed was cancelled on its way into the arena, and was waited for for ever."""
    admit = host.arena.admit

    async def slowly(chunks: Sequence[tuple[bytes, bytes]], *, ahead: bool = False) -> int:
        await asyncio.sleep(0.05)
        return await admit(chunks, ahead=ahead)

    monkeypatch.setattr(host.arena, "admit", slowly)
    host.streamer.break_after = 10 * host.streamer.piece
    async with asyncio.timeout(60):
        outcome = await host.stream()
    assert outcome.error == "the line broke"
    assert outcome.chunks + outcome.left == 25
    assert host.fetcher.flying == 0
    assert all(host.arena.holds(host.map.digest(n)) for n, _ in host.places)


async def test_a_chunk_that_came_wrong_is_never_shown(host: Host) -> None:
    """A boot pack is a copy: its rot costs a GET of the original, and no wrong byte."""
    place = host.places[3][1]
    body = bytearray(host.streamer.body)
    body[place.offset + place.stored_length // 2] ^= 1
    host.streamer.body = bytes(body)
    outcome = await host.stream()
    assert (outcome.chunks, outcome.left) == (24, 1)
    assert host.fetcher.counters.corrupt_bodies == 1
    assert host.reader.condemned == ["k"]
    device = open_device(host.map, host.arena, host.fetcher, read_ahead=False)
    for number in range(25):
        offset = host.offset_of(number)
        found = b"".join(bytes(x) for x in await device.read(offset, 64 * BLOCK))
        assert found == host.image.read(offset, 64 * BLOCK)


async def test_what_is_here_costs_nothing(host: Host) -> None:
    await host.stream()
    host.streamer.asked.clear()
    outcome = await host.stream()
    assert (outcome.bytes, outcome.already_here) == (0, 25)
    assert host.streamer.asked == []


async def test_where_most_is_here_the_rest_comes_by_ranged_reads(host: Host) -> None:
    """Of a previous version's host little is missing: no stream of it all again."""
    await host.fetcher.prefetch(host.map, [ordinal for ordinal, _ in host.places[:20]])
    host.reader.reads.clear()
    outcome = await host.stream()
    assert host.streamer.asked == []
    assert outcome.already_here == 20
    assert host.reader.reads
    assert all(host.arena.holds(host.map.digest(n)) for n, _ in host.places)


@pytest.mark.quick
def test_when_to_overtake() -> None:
    """2.5 MB behind at 100 MB/s are as long as a GET of 20 ms: not worth one; 5 MB are."""
    assert not is_far(2.4e6, 100e6, 0.0, 0.02)
    assert is_far(5e6, 100e6, 0.0, 0.02)
    assert is_far(0, 100e6, 0.1, 0.02)  # silent for longer than two GETs take
