"""When a start is over: the rule by which a recording that nobody stops ends. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CalmRule:
    """A start is over when nothing new was read for a while; all in seconds.

    The while grows with the start itself (`share` of it), because a program that loads for twenty
    seconds also computes for some between two reads; it is at least `least` and at most `most`. A
    read touches new blocks in bursts: `trickle_bytes` per quiet period still count as calm. Before
    the first burst there are only the probes of who attaches a disk, and a machine may take long
    from there to its first mount: until then only `limit` counts.
    """

    least: float = 2.0
    most: float = 20.0
    share: float = 0.5
    trickle_bytes: int = 64 << 10
    limit: float = 120.0

    def quiet_seconds(self, elapsed: float) -> float:
        """How long it must be quiet after `elapsed` seconds of start."""
        return min(self.most, max(self.least, elapsed * self.share))


class Calm:
    """One start's progress towards calm. Times are monotonic seconds given by the caller."""

    def __init__(self, rule: CalmRule) -> None:
        self._rule = rule
        self._begin: float | None = None
        self._had_burst = False
        self._burst_end = 0.0  # when more than a trickle was last completed
        self._trickle = 0
        self._trickle_since = 0.0

    def touched(self, now: float, new_bytes: int) -> None:
        """Blocks were read that had not been read before."""
        if self._begin is None:
            self._begin = self._burst_end = self._trickle_since = now
        # What trickled in long ago does not make a burst together with what comes now.
        if now - self._trickle_since > self._rule.quiet_seconds(self._burst_end - self._begin):
            self._trickle, self._trickle_since = 0, now
        self._trickle += new_bytes
        if self._trickle > self._rule.trickle_bytes:
            self._burst_end = self._trickle_since = now
            self._trickle, self._had_burst = 0, True

    def ends_at(self) -> float | None:
        """When the start counts as over if nothing more comes; None before the first read."""
        if self._begin is None:
            return None
        latest = self._begin + self._rule.limit
        if not self._had_burst:
            return latest
        quiet = self._rule.quiet_seconds(self._burst_end - self._begin)
        return min(self._burst_end + quiet, latest)
