"""An arena, a fetcher and devices over images in a memory store."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from kits.cacheimage import KitImage, KitReader, make_image
from kits.until import until

from imagecache.cache.arena import Arena
from imagecache.cache.device import BlockImageDevice, open_device
from imagecache.cache.fetch import Fetcher
from imagecache.cache.settings import ArenaSettings, FetchSettings
from imagecache.store.memory import MemoryStore

FAST = FetchSettings(retry_first_seconds=0.02, retry_most_seconds=0.05)


@dataclass
class Bench:
    """One host's cache, put together as the daemon does it."""

    directory: Path
    store: MemoryStore
    reader: KitReader
    arena: Arena
    fetcher: Fetcher
    devices: list[BlockImageDevice] = field(default_factory=list)

    def image(self, **how: object) -> KitImage:
        return make_image(self.store, **how)

    def device(self, image: KitImage, **how: object) -> BlockImageDevice:
        device = open_device(image.map(), self.arena, self.fetcher, **how)
        self.devices.append(device)
        return device

    def patience(self, seconds: float) -> None:
        """How long reads wait from now on; the default is long enough for a busy machine."""
        self.fetcher.settings = replace(
            self.fetcher.settings, stall_seconds=seconds, attempt_seconds=seconds * 0.8
        )

    async def settled(self) -> None:
        """Returns when the arena has written what reads were answered from meanwhile."""
        await until(lambda: not self.fetcher.flying, "the end of all flights")

    async def close(self) -> None:
        await self.fetcher.close()
        self.arena.table.check()
        await self.arena.close()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Callable[..., object]]:
    """`await bench(budget=..., **ArenaSettings)` gives a Bench; called again, a restarted one."""
    opened: list[Bench] = []
    store = MemoryStore()
    reader = KitReader(store)

    async def start(*, fetch: FetchSettings = FAST, **settings: object) -> Bench:
        for old in opened:
            await old.close()
        opened.clear()
        settings = {"budget_bytes": 64 << 20, "scrub_bytes_per_second": 0, **settings}
        arena = await Arena.open(tmp_path / "arena", ArenaSettings(**settings))
        made = Bench(tmp_path / "arena", store, reader, arena, Fetcher(reader, arena, fetch))
        opened.append(made)
        return made

    yield start
    for left in opened:
        with contextlib.suppress(OSError):
            await left.close()
