"""The cache behind a real server and socket: a damaged map is one request's repair."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
from kits.nbd_client import EIO, READ, RawClient

from imagecache.cache.settings import Integrity
from nbdserver.exports import StaticExports
from nbdserver.server import Server


def client(path: Path, image, seed: int, rounds: int, *, holding: int = 1) -> int:
    """Reads at random, `holding` requests at a time, and compares; how many reads."""
    rng = random.Random(seed)
    with RawClient(path) as raw:
        raw.greet().go(b"disk")
        for _ in range(rounds):
            wanted = {}
            batch = b""
            for _ in range(holding):
                at = rng.randrange(raw.size)
                length = min(rng.choice([512, 4096, 65536, 300_000]), raw.size - at)
                batch += raw.pack(READ, at, length)
                wanted[raw.last] = (at, length)
            raw.send(batch)
            for _ in range(holding):
                reply = raw.reply()
                at, length = wanted.pop(reply.cookie)
                assert reply.error == 0
                assert reply.data == image.read(at, length)
    return rounds * holding


@pytest.fixture
async def served(bench, tmp_path: Path):
    """`await served(device)` gives the socket's path."""
    server = Server()

    async def serve(device) -> Path:
        path = tmp_path / "nbd.sock"
        server.listen_unix(path, StaticExports({"disk": device}))
        return path

    yield serve
    await server.close()


@pytest.mark.parametrize("policy", list(Integrity))
async def test_many_clients_read_cold_and_warm(bench, served, policy: Integrity) -> None:
    b = await bench(integrity=policy, budget_bytes=4 << 20)
    b.reader.delay = 0.002
    image = b.image(chunks=60)
    path = await served(b.device(image))
    clients = [asyncio.to_thread(client, path, image, n, 40, holding=16) for n in range(6)]
    await asyncio.gather(*clients)
    await b.settled()
    assert b.arena.stats().pinned == 0
    b.arena.table.check()


async def test_a_truncated_arena_is_repaired_under_the_server(bench, served) -> None:
    """H1: the mapped file loses its pages: EFAULT, a compared copy, a refetch; no SIGBUS."""
    b = await bench()
    image = b.image(chunks=40, holes=False)
    device = b.device(image, read_ahead=False)
    path = await served(device)
    await asyncio.to_thread(client, path, image, 1, 60, holding=8)
    await b.settled()
    for n in range(4):
        os.truncate(b.directory / "slots", 0)
        await asyncio.to_thread(client, path, image, n, 30, holding=8)
        await b.settled()
    assert device.counters.copies > 0
    assert b.arena.stats().pinned == 0
    b.arena.table.check()


async def test_the_store_dies_under_the_server(bench, served) -> None:
    """F30: with the store gone a cold read is EIO, the connection lives, and later reads work."""
    b = await bench()
    image = b.image(chunks=6, blocks=8, holes=False, packs=6)
    path = await served(b.device(image, read_ahead=False))

    def ask() -> list[int]:
        with RawClient(path) as raw:
            raw.greet().go(b"disk")
            errors = []
            for away, block in ((False, 0), (True, 0), (True, 16), (False, 16)):
                b.reader.away = away
                b.patience(0.6 if away else 15)
                raw.send(raw.pack(READ, block * 4096, 4096))
                reply = raw.reply()
                errors.append(reply.error)
                assert reply.error or reply.data == image.read(block * 4096, 4096)
            return errors

    assert await asyncio.to_thread(ask) == [0, 0, EIO, 0]
