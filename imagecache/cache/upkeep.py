"""The arena's background work: finding chunks that no index names, and looking for rot."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from imagecache.cache.slotfile import ShortFile
from imagecache.cache.slots import SlotState
from imagecache.chunks import BLOCK, ZERO_BLOCK, chunk_digest

if TYPE_CHECKING:
    from imagecache.cache.arena import Arena

_PAUSE_SECONDS = 60.0
_FIRST_CHECK_FACTOR = 16  # chunks unchecked since the start are looked at this much faster


def start_upkeep(arena: Arena) -> list[Coroutine[Any, Any, None]]:
    """The coroutines that an arena runs from its start to its end."""
    jobs = [recover(arena)]
    if arena.settings.scrub_bytes_per_second:
        jobs.append(scrub_forever(arena))
    return jobs


async def recover(arena: Arena) -> None:
    """Names the data in slots that a lost index no longer names: each is its own evidence."""
    table = arena.table
    while (found := table.next_unknown()) is not None:
        slot, blocks = found

        def job(slot: int = slot, blocks: int = blocks) -> tuple[bytes, int]:
            plaintext = without_zero_tail(arena.file.read(slot, blocks * BLOCK))
            return chunk_digest(plaintext), len(plaintext) // BLOCK

        try:
            digest, size = await arena.run(job)
        except (OSError, ShortFile):
            digest, size = b"", 0
        if table.recovered(slot, digest if size else None, size):
            arena.note_recovered(slot)


def without_zero_tail(data: bytes) -> bytes:
    """Data without trailing all-zero blocks; no chunk has one."""
    end = len(data)
    while end and data[end - BLOCK : end] == ZERO_BLOCK:
        end -= BLOCK
    return data[:end]


async def scrub_forever(arena: Arena) -> None:
    """Reads every chunk back, slowly, again and again; `Arena.copy` drops what has rotted."""
    while True:
        await scrub_once(arena)
        await asyncio.sleep(_PAUSE_SECONDS)


async def scrub_once(arena: Arena) -> None:
    """One pass over what is in the arena at its begin, those unchecked since the start first."""
    table = arena.table
    slots = sorted(table.present_slots(), key=lambda slot: table.states[slot])
    for slot in slots:
        digest = table.digests[slot]
        if digest is None:
            continue
        rate = arena.settings.scrub_bytes_per_second
        if table.states[slot] == SlotState.UNCHECKED:
            rate *= _FIRST_CHECK_FACTOR
        length = table.blocks[slot] * BLOCK
        await arena.copy(digest)
        await asyncio.sleep(length / rate if rate else 0)
