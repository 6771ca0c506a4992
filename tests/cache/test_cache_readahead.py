"""The plan of read-ahead: streams, files, directories, luck."""

from __future__ import annotations

import random
from array import array

import pytest

from imagecache.cache.aheadplan import MAX_WINDOW, STREAMS, AheadPlan, FileRuns

pytestmark = pytest.mark.quick
EXTENT = 256 << 10


def plan_of(extents: int, files: list[tuple[int, int, int]] | None = None) -> AheadPlan:
    """A disk of equal extents; `files` are (first extent, extents, folder)."""
    starts = array("Q", [n * EXTENT for n in range(extents)])
    plan = AheadPlan(starts, array("Q", [at + EXTENT for at in starts]))
    if files is not None:
        plan.files = FileRuns(
            array("Q", [first * EXTENT for first, _, _ in files]),
            array("Q", [(first + count) * EXTENT for first, count, _ in files]),
            array("I", [folder for _, _, folder in files]),
        )
    return plan


def forward(plan: AheadPlan, extents: range) -> list[int]:
    """Reads one extent after the other; what was asked for, in order."""
    return [n for at in extents for n in plan.touched(at, at)]


def test_nothing_is_asked_for_at_a_first_touch() -> None:
    assert not plan_of(100).touched(5, 7)


def test_a_stream_is_asked_for_once_in_growing_windows() -> None:
    plan = plan_of(1000)
    asked = forward(plan, range(10, 300))
    assert asked == list(range(asked[0], asked[-1] + 1))
    assert asked[0] == 12
    assert 299 < asked[-1] <= 299 + MAX_WINDOW
    assert plan.goes_forward


def test_random_reads_ask_for_nothing() -> None:
    plan = plan_of(10_000)
    reads = random.Random(3).sample(range(0, 10_000, 40), 200)
    assert not [n for at in reads for n in plan.touched(at, at)]


def test_a_window_ends_with_the_file() -> None:
    """A reader of one file never brings the next one."""
    plan = plan_of(1000, [(0, 100, 1), (100, 50, 1), (150, 850, 2)])
    assert forward(plan, range(100)) == list(range(2, 100))


def test_the_rest_of_a_short_file_comes_at_once() -> None:
    plan = plan_of(1000, [(0, 14, 1), (14, 900, 1)])
    assert not plan.touched(0, 0)
    assert plan.touched(1, 1) == range(2, 14)


def test_files_of_a_directory_read_one_after_another_bring_their_neighbours() -> None:
    """From one file into the next: now the window reaches on, to the directory's end."""
    files = [(n * 3, 3, 1) for n in range(20)] + [(60, 200, 2)]
    plan = plan_of(1000, files)
    first = forward(plan, range(3))
    assert set(first) == {2}
    asked = forward(plan, range(3, 30))
    assert max(asked) > 33
    assert max(asked + forward(plan, range(30, 60))) == 59


def test_across_directories_when_the_reader_goes_there() -> None:
    files = [(0, 10, 1), (10, 10, 1), (20, 10, 2), (30, 10, 3), (40, 200, 4)]
    plan = plan_of(300, files)
    assert max(forward(plan, range(25))) > 30


def test_streams_beside_each_other() -> None:
    plan = plan_of(10_000)
    heads = [n * 1000 for n in range(STREAMS)]
    asked = {head: [] for head in heads}
    for step in range(50):
        for head in heads:
            asked[head] += plan.touched(head + step, head + step)
    assert all(len(found) == len(set(found)) >= 48 for found in asked.values())


def test_the_first_window_learns_from_waste_and_from_luck() -> None:
    wasteful = plan_of(100_000)
    for n in range(50):
        forward(wasteful, range(n * 1000, n * 1000 + 2))
    assert wasteful.first_window == 1
    assert wasteful.used * 2 < wasteful.asked
    lucky = plan_of(100_000)
    for n in range(50):
        forward(lucky, range(n * 1000, n * 1000 + 200))
    assert lucky.first_window > 4
    assert lucky.used * 2 > lucky.asked


def test_any_reads_at_all_ask_for_each_extent_of_a_stream_once_and_inside_the_disk() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        files, at = [], 0
        while at < 2000:
            count = rng.choice((1, 1, 2, 5, 40))
            files.append((at, count, rng.randrange(5)))
            at += count
        plan = plan_of(at, files)
        for _ in range(500):
            first = rng.randrange(at)
            for step in range(rng.randint(1, 20)):
                low = min(at - 1, first + step)
                found = plan.touched(low, min(at - 1, low + rng.randint(0, 2)))
                assert 0 <= found.start <= found.stop <= at
                assert len(found) <= 4 * MAX_WINDOW
