"""What is evicted: scans pass through, what is used again stays."""

import random

import pytest

from imagecache.cache.recency import Recency
from imagecache.cache.slots import SlotTable
from imagecache.chunks import chunk_digest

pytestmark = pytest.mark.quick


def put(table: SlotTable, number: int, blocks: int = 1) -> int:
    digest = chunk_digest(str(number).encode())
    reservation = table.reserve(blocks)
    if reservation is None:
        return -1
    for slot in reservation.punches:
        table.punched(slot, given_back=True)
    table.commit(reservation, digest, ahead=False)
    table.check()
    return reservation.slot


def has(table: SlotTable, number: int) -> bool:
    return table.checked(chunk_digest(str(number).encode())) >= 0


def touch(table: SlotTable, number: int) -> None:
    table.recency.touched[table.find(chunk_digest(str(number).encode()))] = table.recency.tick


def later(recency: Recency) -> None:
    for _ in range(3):
        recency.advance()


def test_one_scan_does_not_push_out_what_is_used() -> None:
    table = SlotTable(400, 100)
    for number in range(60):
        put(table, number)
    later(table.recency)
    for number in range(60):
        touch(table, number)
    for number in range(1000, 3000):
        put(table, number)
        for _ in range(64):  # one pass over a chunk touches it block by block
            touch(table, number)
        if number % 20 == 0:
            table.recency.advance()
    assert sum(has(table, number) for number in range(60)) == 60


def test_a_chunk_that_comes_back_is_believed() -> None:
    table = SlotTable(80, 20)
    for number in range(40):
        put(table, number)
    gone = next(number for number in range(40) if not has(table, number))
    put(table, gone)
    for number in range(100, 110):
        put(table, number)
    assert has(table, gone)


def test_waste_is_counted_once_and_only_for_what_nobody_read() -> None:
    table = SlotTable(80, 20)
    for number in range(20):
        digest = chunk_digest(str(number).encode())
        table.commit(table.reserve(1), digest, ahead=True)
        if number < 5:
            touch(table, number)
    for number in range(100, 180):
        put(table, number)
    assert table.wasted == 15


def test_eviction_ends_when_everything_is_held() -> None:
    """H7: pinned and leased chunks are never taken, and looking for a victim ends."""
    table = SlotTable(80, 20)
    slots = [put(table, number) for number in range(20)]
    for slot in slots[:10]:
        table.pin(slot)
    leased = [chunk_digest(str(number).encode()) for number in range(10, 20)]
    table.lease(leased, 0)
    assert put(table, 99) == -1
    table.unpin(slots[3])
    assert put(table, 99) >= 0
    assert not has(table, 3)
    table.unlease(leased, 0)
    assert put(table, 100) >= 0
    assert sum(has(table, n) for n in (*range(20), 99, 100)) == 20


def test_ticks_wrap() -> None:
    """H8: recency counts ticks, not time: nothing happens when any number of them has passed."""
    table = SlotTable(80, 20)
    for number in range(20):
        put(table, number)
    for _ in range(1000):
        table.recency.advance()
        assert 1 <= table.recency.tick <= 255
    assert all(has(table, number) for number in range(20))


@pytest.mark.parametrize("can_punch", [True, False])
def test_the_budget_holds_whatever_the_sizes(can_punch: bool) -> None:
    table = SlotTable(1000, 250)
    table.can_punch = can_punch
    rng = random.Random(5)
    stored = 0
    for number in range(2000):
        stored += put(table, rng.randrange(500) + number * 1000, rng.randint(1, 64)) >= 0
        assert table.used_blocks <= 250
    # Without punching, small slots that have filled the budget leave no room for a large chunk.
    assert stored == 2000 if can_punch else stored > 1500


def test_a_chunk_larger_than_the_cache_is_not_kept() -> None:
    """H7: a cache smaller than one chunk keeps nothing, and says so at once."""
    table = SlotTable(1, 10)
    assert table.reserve(11) is None
    table.check()


def test_more_small_chunks_than_slots() -> None:
    table = SlotTable(10, 640)
    for number in range(100):
        assert put(table, number) >= 0
    assert len(table) == 10
