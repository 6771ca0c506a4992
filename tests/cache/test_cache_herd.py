"""Many clients start one image at once on a cold host: what the origin has to send for that."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import nbd
import pytest
from imagemaker.entries import Entry, directory
from kits.image import write_image
from kits.journey import Cubecache
from kits.until import soon
from testbed.processes import Stage
from testbed.servers import Proxy, start_object_store, start_proxy, store_environment

from imagecache.cache.image import ImageMap
from imagecache.composition import opened_catalog
from imagecache.settings import Settings

MOST = 1.02
NO_READ_AHEAD = "[cache]\nread_ahead = false\n"


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


def write_files(folder: Path, megabytes: int) -> str:
    rng = random.Random(6)
    files = [directory("lib")]
    files += [
        Entry(f"lib/{n:03}", content=rng.randbytes(700_000)) for n in range(megabytes * 10 // 7)
    ]
    return write_image(folder, [files], compression="none")


async def map_of(url: str, state: Path) -> ImageMap:
    async with opened_catalog(Settings(state_dir=state, store_url=url)) as (_, catalog):
        root = await anext(aiter(catalog.roots()))
        return ImageMap(
            await catalog.block_manifest(root),
            await catalog.location_table(root),
            lambda name: name.hex(),
        )


async def fetched(state: Path) -> tuple[int, int]:
    """GETs and bytes that the daemon's fetcher asked for, hedges and retries left out."""
    connector = aiohttp.UnixConnector(path=str(state / "control.sock"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://daemon/metrics") as answer,
    ):
        text = await answer.text()
    found = []
    for name in ("gets", "bytes"):
        rows = re.findall(rf"^cubecache_fetch_{name}_total{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        assert rows, text
        found.append(int(sum(map(float, rows))))
    return found[0], found[1]


def pieces(image: ImageMap, count: int) -> list[tuple[int, int]]:
    """What a start reads: runs of small reads here and there, the same for every client."""
    rng = random.Random(9)
    found = []
    starts = [at for at in image.starts if at < image.size_bytes - (1 << 20)]
    for _ in range(count):
        at = rng.choice(starts)
        for _ in range(rng.randint(1, 6)):
            length = rng.choice((4096, 16384, 65536, 131072))
            found.append((at, length))
            at += length
    return found


def herd(uris: list[str], reads: list[tuple[int, int]], clients: int) -> None:
    """All clients ask for all of it before any of them waits; they must be told the same bytes."""
    handles = []
    for number in range(clients):
        handle = nbd.NBD()
        handle.connect_uri(uris[number % len(uris)])
        handles.append(handle)
    buffers = [[nbd.Buffer(length) for _, length in reads] for _ in handles]
    for step, (at, _) in enumerate(reads):
        for handle, into in zip(handles, buffers, strict=True):
            handle.aio_pread(into[step], at)
    for handle in handles:
        deadline = time.monotonic() + 300
        while handle.aio_in_flight() > 0:
            done = handle.aio_peek_command_completed()
            if done > 0:
                assert handle.aio_command_completed(done)
            else:
                assert handle.poll(90_000) == 1, "nothing came for 90 s"
            assert time.monotonic() < deadline, "the herd is not served"
    told = [bytes(buffer.to_bytearray()) for buffer in buffers[0]]
    for into in buffers[1:]:
        assert [bytes(buffer.to_bytearray()) for buffer in into] == told
    for handle in handles:
        handle.shutdown()


def stampede(stage: Stage, tmp_path: Path, *, megabytes: int, clients: int, runs: int) -> float:
    """Origin bytes per stored byte of the distinct chunks that were touched."""
    store = start_object_store(stage)
    environment = store_environment()
    builder = Cubecache(stage, stage.folder / "builder", store.url(), environment)
    image = write_files(tmp_path / "image", megabytes)
    builder.preload(image)
    proxy: Proxy = start_proxy(stage, store.endpoint, first_byte_ms=20)
    config = stage.folder / "config.toml"
    config.write_text(NO_READ_AHEAD)
    url = store.url(proxy.endpoint)
    host = Cubecache(stage, stage.folder / "host", url, environment, config)
    daemon = host.serve()
    uris = [
        daemon.export(image, "--fill", "none"),
        daemon.export(image, "--fill", "none", "--socket", str(stage.folder / "own.sock")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        mapped = asyncio.run(soon(map_of(store.url(), stage.folder / "asked")))
    reads = pieces(mapped, runs)
    touched = {n for at, length in reads for n in mapped.ordinals_in(at, at + length)}
    stored = sum(mapped.stored_length(n) for n in touched)
    gets_before, bytes_before = asyncio.run(soon(fetched(host.state)))
    proxy.reset()
    herd(uris, reads, clients)
    gets, asked = asyncio.run(soon(fetched(host.state)))
    gets, asked = gets - gets_before, asked - bytes_before
    sent = proxy.counters()["ranges"]
    extra = max(0, sent["requests"] - gets)  # hedges: a slow answer's second request
    print(
        f"{clients} clients, {len(reads)} reads each, {len(touched)} chunks, "
        f"{stored:,} bytes stored: "
        f"{gets} GETs of {asked:,} bytes ({asked / stored:.4f}), {extra} hedges; "
        f"the origin sent {sent['bytes']:,}"
    )
    assert asked <= MOST * stored
    assert sent["bytes"] <= MOST * stored + extra * max(asked, 1) / max(gets, 1) * 8
    assert extra <= 8 + gets // 10
    assert daemon.stop() == 0
    return asked / stored


def test_clients_that_start_together_cost_one_start(stage: Stage, tmp_path: Path) -> None:
    """20 libnbd clients, one cold image, two exports: each chunk comes once."""
    assert stampede(stage, tmp_path, megabytes=14, clients=20, runs=20) <= MOST


@pytest.mark.soak
def test_200_clients_that_start_together_cost_one_start(stage: Stage, tmp_path: Path) -> None:
    """200 libnbd clients, one cold image, prefetch off: at most 1.02 of what was touched."""
    assert stampede(stage, tmp_path, megabytes=140, clients=200, runs=120) <= MOST
