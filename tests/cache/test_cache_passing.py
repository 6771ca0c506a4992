"""Passing an arena on: frozen, looked at by another, thawed again or claimed."""

import asyncio
import os
from pathlib import Path

import pytest

from imagecache.cache.arena import Arena
from imagecache.cache.settings import ArenaSettings
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.errors import Busy, Unavailable

pytestmark = pytest.mark.quick

SETTINGS = ArenaSettings(budget_bytes=4 << 20, scrub_bytes_per_second=0)


def chunk(number: int) -> tuple[bytes, bytes]:
    body = bytes([number + 1]) * BLOCK
    return chunk_digest(body), body


async def test_a_successor_sees_what_was_admitted_and_writes_nothing_before_it_claims(
    tmp_path: Path,
) -> None:
    old = await Arena.open(tmp_path, SETTINGS)
    assert await old.admit([chunk(0), chunk(1)], ahead=False) == 2
    await old.freeze()
    waiting = asyncio.create_task(old.admit([chunk(2)], ahead=False))
    new = await Arena.look(tmp_path, SETTINGS)
    with pytest.raises(Unavailable):
        assert new.lock_fd
    assert await new.copy(chunk(1)[0]) == chunk(1)[1]
    early = asyncio.create_task(new.admit([chunk(3)], ahead=False))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert not early.done()
    # The successor gives up: the old one goes on as if nothing had been.
    early.cancel()
    new.let_go()
    await new.close()
    old.thaw()
    assert await waiting == 1
    await old.freeze()
    new = await Arena.look(tmp_path, SETTINGS)
    assert await new.copy(chunk(2)[0]) == chunk(2)[1]
    await new.claim(os.dup(old.lock_fd), tmp_path)
    old.let_go()
    await old.close()
    with pytest.raises(Busy):
        await Arena.open(tmp_path, SETTINGS)
    assert await new.admit([chunk(4)], ahead=False) == 1
    await new.close()
    again = await Arena.open(tmp_path, SETTINGS)
    for number in (0, 1, 2, 4):
        assert await again.copy(chunk(number)[0]) == chunk(number)[1]
    await again.close()


async def test_a_lock_of_somebody_else_is_no_claim(tmp_path: Path) -> None:
    old = await Arena.open(tmp_path, SETTINGS)
    await old.freeze()
    new = await Arena.look(tmp_path, SETTINGS)
    other = os.open(tmp_path / "lock", os.O_RDWR)
    try:
        with pytest.raises(Busy):
            await new.claim(other, tmp_path)
    finally:
        os.close(other)
    new.let_go()
    await new.close()
    old.thaw()
    assert await old.admit([chunk(0)], ahead=False) == 1
    await old.close()
