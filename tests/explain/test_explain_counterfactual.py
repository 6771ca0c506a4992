"""What a stream would have changed: small cases reckoned by hand."""

import pytest

from imagecache.explain.counterfactual import Stall, with_stream

pytestmark = pytest.mark.quick
LENGTHS = [1_000_000] * 10


def test_nothing_covered_changes_nothing() -> None:
    stalls = [Stall(0.0, 0.1, (5,)), Stall(0.5, 0.2, (6,))]
    found = with_stream(stalls, [], LENGTHS, first_byte=0.02, rate=1e8)
    assert (found.before, found.after) == pytest.approx((0.3, 0.3))
    assert found.not_covered == 2


def test_what_arrived_before_it_was_read_costs_nothing() -> None:
    found = with_stream([Stall(1.0, 0.1, (0,))], [0], LENGTHS, first_byte=0.02, rate=1e8)
    assert (found.before, found.after, found.not_covered) == (pytest.approx(0.1), 0.0, 0)


def test_a_read_ahead_of_the_stream_waits_for_its_chunk() -> None:
    """Chunk 0 is there after 20 ms + 10 ms; it was read at 0 and took 100 ms."""
    found = with_stream([Stall(0.0, 0.1, (0,))], [0], LENGTHS, first_byte=0.02, rate=1e8)
    assert found.after == pytest.approx(0.03)


def test_a_saved_wait_moves_everything_behind_it_forward() -> None:
    """The second read comes 100 ms earlier, and finds its chunk not there yet."""
    stalls = [Stall(0.0, 0.1, (0,)), Stall(0.11, 0.1, (9,))]
    plan = list(range(10))
    found = with_stream(stalls, plan, LENGTHS, first_byte=0.0, rate=1e8)
    # Chunk 0 at 10 ms (90 ms saved); the second read is at 20 ms, its chunk comes at 100 ms.
    assert found.after == pytest.approx(0.01 + 0.08)


def test_waits_side_by_side_count_once() -> None:
    stalls = [Stall(0.0, 0.1, (1,)), Stall(0.05, 0.1, (2,))]
    found = with_stream(stalls, [], LENGTHS, first_byte=0.0, rate=1e8)
    assert found.before == pytest.approx(0.15)


def test_the_stream_never_makes_it_worse() -> None:
    stalls = [Stall(0.0, 0.01, (9,)), Stall(0.02, 0.01, (0,))]
    found = with_stream(stalls, list(range(10)), LENGTHS, first_byte=5.0, rate=1e3)
    assert found.after <= found.before
