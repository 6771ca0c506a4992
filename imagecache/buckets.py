"""A histogram of times as plain counts, cheap enough for the read path."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)


@dataclass(slots=True)
class Buckets:
    """How often something took up to each of BOUNDS (seconds), the last count beyond them all.

    One owner (a thread or an event loop); `seconds` is the sum.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts one time."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    @property
    def count(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, how many up to it), as Prometheus wants them, the last bound `+Inf`."""
        found, total = [], 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found

    def quantile(self, share: float) -> float | None:
        """The bound below which this share of all times lies; None where there are none."""
        wanted, total = share * self.count, 0
        if not self.count:
            return None
        for bound, count in zip((*BOUNDS, BOUNDS[-1]), self.counts, strict=True):
            total += count
            if total >= wanted:
                return bound
        return BOUNDS[-1]
