"""Known chunks: which are used again, and how far an image may be in pieces."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagecache.blockimage.locations import Location
from imagecache.build.known import SPARE_PACKS, in_few_packs
from imagecache.build.reuse import (
    BYTES_PER_RUN,
    GAP_BYTES,
    LEAST_RUN_BYTES,
    SPARE_RUNS,
    ReuseRuns,
    most_runs,
)
from imagecache.packs.pack import TARGET_BYTES

pytestmark = pytest.mark.quick

PLAIN = 256 << 10


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def place(pack: int, offset: int, length: int) -> Location:
    return Location(pack.to_bytes(36, "big"), offset, length, 1, 0)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 6),  # new chunks before the run
            st.integers(1, 12),  # known chunks of the run
            st.integers(1, PLAIN),  # stored bytes of each
            st.sampled_from([0, GAP_BYTES, GAP_BYTES + 1]),  # between two of them
        ),
        max_size=120,
    )
)
def test_runs_are_bounded_and_nothing_is_lost(
    plan: list[tuple[int, int, int, int]],
) -> None:
    """Every known chunk is either used again or handed back to be stored, and runs are few."""
    runs: ReuseRuns[int] = ReuseRuns(LEAST_RUN_BYTES)
    left: list[int] = []
    order: list[tuple[int, Location]] = []
    passed = stored = offset = 0
    for new, known, length, gap in plan:
        for _ in range(new):
            runs.passed(PLAIN)
            passed += PLAIN
            left += runs.end()
        offset += 10 * GAP_BYTES
        for _ in range(known):
            at = place(1, offset, length)
            number = len(order)
            order.append((number, at))
            runs.passed(PLAIN)
            passed += PLAIN
            stored += length
            left += runs.add(digest(number), at, number, PLAIN)
            offset += length + gap
    left += runs.end()
    used = [number for number, _ in order if digest(number) in runs.reused]
    assert sorted(used + left) == [number for number, _ in order]
    pieces = 0
    last = None
    for number, at in order:
        if digest(number) in runs.reused:
            far = last is None or at.offset - last.offset - last.stored_length > GAP_BYTES
            pieces += far
            last = at
    assert pieces <= most_runs(passed, stored)


def test_short_runs_are_used_while_they_are_few() -> None:
    runs: ReuseRuns[int] = ReuseRuns(LEAST_RUN_BYTES)
    left: list[int] = []
    for number in range(SPARE_RUNS + 100):
        left += runs.add(digest(number), place(number, 0, 1000), number, PLAIN)
    left += runs.end()
    assert len(runs.reused) == SPARE_RUNS
    assert left == list(range(SPARE_RUNS, SPARE_RUNS + 100))
    runs.passed(3 * BYTES_PER_RUN)
    for number in range(1000, 1010):
        left += runs.add(digest(number), place(number, 0, 1000), number, PLAIN)
    assert len(left) == 100 + 9 - 3


def test_long_runs_are_used_without_end() -> None:
    runs: ReuseRuns[int] = ReuseRuns(LEAST_RUN_BYTES)
    left = []
    for pack, n in itertools.product(range(100), range(5)):
        at = place(pack, n * PLAIN, PLAIN)
        left += runs.add(digest(pack * 5 + n), at, 0, PLAIN)
    assert not left + runs.end()
    assert len(runs.reused) == 500


def test_one_image_relies_on_few_packs() -> None:
    """Slivers of many old packs are stored again, so that these packs can be collected."""
    slivers = {digest(n): place(n, 0, 1000) for n in range(1000)}
    big = {digest(5000 + n): place(5000, n * PLAIN, PLAIN) for n in range(TARGET_BYTES // PLAIN)}
    kept = in_few_packs(slivers | big)
    assert set(big) <= set(kept)
    packs = {at.pack for at in kept.values()}
    assert len(packs) <= 2 * 2 + SPARE_PACKS
    assert in_few_packs(big) == big
    assert in_few_packs({}) == {}
