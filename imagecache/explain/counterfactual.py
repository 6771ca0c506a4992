"""What a start would have waited for, had a boot pack been streaming ahead of it. Pure.

The guest does what it did, only earlier: whatever a stall no longer takes moves everything behind
it forward. A chunk of the plan is there when the stream has brought it; every other one takes as
long as it took. The link's other traffic is left out, so this is a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stall:
    """A wait as it was: seconds from the start's first read, and the chunks it was for."""

    at: float
    seconds: float
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """Seconds in which at least one read waited, as it was and as it would be."""

    before: float
    after: float
    not_covered: int


def with_stream(
    stalls: Sequence[Stall],
    plan: Sequence[int],
    stored_lengths: Sequence[int],
    *,
    first_byte: float,
    rate: float,
) -> Counterfactual:
    """`stalls` by begin; `plan` are chunks in stream order; the stream begins with the start.

    Stalls that overlap count once, and are moved together.
    """
    arrival: dict[int, float] = {}
    at = first_byte
    for ordinal in plan:
        at += stored_lengths[ordinal] / rate
        arrival.setdefault(ordinal, at)
    before = after = saved = 0.0
    not_covered = 0
    end_before = end_after = 0.0
    for stall in stalls:
        begin = stall.at - saved
        covered = bool(stall.chunks) and all(chunk in arrival for chunk in stall.chunks)
        not_covered += not covered
        seconds = stall.seconds
        if covered:
            # Its own GET would not be slower than it was: demand overtakes a stream.
            seconds = min(seconds, max(0.0, max(arrival[c] for c in stall.chunks) - begin))
        new_before = max(0.0, stall.at + stall.seconds - max(end_before, stall.at))
        new_after = max(0.0, begin + seconds - max(end_after, begin))
        before += new_before
        after += new_after
        saved += max(0.0, new_before - new_after)
        end_before = max(end_before, stall.at + stall.seconds)
        end_after = max(end_after, begin + seconds)
    return Counterfactual(before, min(after, before), not_covered)
