"""Leases: named content stays in the arena while somebody has a right to it."""

from __future__ import annotations

import asyncio

from imagecache.cache.slots import SlotTable


class Lease:
    """A holder's right that chunks stay in the arena once they are there."""

    def __init__(self, table: SlotTable, digests: frozenset[bytes], weight: int) -> None:
        """`weight`: bytes of the arena that the content takes, as the holder reckons."""
        self._table = table
        self._weight = weight
        self._digests = digests
        self._end: asyncio.TimerHandle | None = None
        table.lease(digests, weight)

    def ends_in(self, seconds: float) -> None:
        """Lets the right run out by itself (monotonic time)."""
        self._end = asyncio.get_running_loop().call_later(seconds, self.release)

    def release(self) -> None:
        """Gives the right back; safe to call twice."""
        if self._end is not None:
            self._end.cancel()
            self._end = None
        digests, self._digests = self._digests, frozenset()
        if digests:
            self._table.unlease(digests, self._weight)
