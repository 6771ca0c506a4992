"""Small arenas with chunks of known content, for tests of the arena."""

from __future__ import annotations

import random
from pathlib import Path

from imagecache.cache.arena import Arena
from imagecache.cache.settings import ArenaSettings
from imagecache.chunks import BLOCK, chunk_digest

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
