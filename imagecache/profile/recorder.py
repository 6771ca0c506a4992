"""The log of one export's start: first touches and waits, in bounded memory."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from imagecache.cache.events import Wait
from imagecache.chunks import BLOCK
from imagecache.profile.calm import Calm, CalmRule

MAX_TOUCHES = 1 << 16
MAX_WAITS = 4096
_LAST_WAITS = 512
_PAGE = 256  # blocks whose touches one bytearray remembers
_SEEN = 1


@dataclass(frozen=True, slots=True)
class FirstRead:
    """Blocks of the disk that were read for the first time; `at` is monotonic time."""

    at: float
    start_block: int
    blocks: int
    hit: bool


class StartLog:
    """What an export read first, in order, until its start is over; its waits; and its totals.

    It is the export's `ReadRecorder`. Memory: 17 bytes for each of at most `MAX_TOUCHES` touches, a
    byte for each block of the pages that were touched, and at most `MAX_WAITS` first and some last
    waits. After the end a batch costs one addition.
    """

    def __init__(self, clock: Callable[[], float], rule: CalmRule | None = None) -> None:
        self.opened = clock()
        self.ended: float | None = None
        self.first_read: float | None = None
        self.reads_total = 0
        self.start_reads = 0
        self.start_bytes = 0
        self.touched_blocks = 0
        self.dropped_touches = 0
        self.dropped_waits = 0
        self.waits: list[Wait] = []
        self.last_waits: deque[Wait] = deque(maxlen=_LAST_WAITS)
        self._clock = clock
        self._calm = Calm(rule or CalmRule())
        self._pages: dict[int, bytearray] = {}
        self._at = array("d")
        self._starts = array("I")
        self._blocks = array("I")
        self._hits = bytearray()

    # --- the device's side

    def reads(self, batch: Sequence[tuple[int, int, bool]]) -> None:
        """Notes a batch of answered reads."""
        self.reads_total += len(batch)
        if self.ended is not None:
            return
        now = self._clock()
        if self.first_read is None:
            self.first_read = now
        new = 0
        for offset, length, hit in batch:
            self.start_bytes += length
            new += self._note(now, offset // BLOCK, -(-(offset + length) // BLOCK), hit)
        self.start_reads += len(batch)
        if new:
            self.touched_blocks += new
            self._calm.touched(now, new * BLOCK)

    def waited(self, wait: Wait) -> None:
        """Notes a wait; of very many, the first ones and the last ones are kept."""
        if len(self.waits) < MAX_WAITS:
            self.waits.append(wait)
            return
        self.dropped_waits += len(self.last_waits) == _LAST_WAITS
        self.last_waits.append(wait)

    def _note(self, now: float, start: int, end: int, hit: bool) -> int:
        """Marks blocks and logs the runs of them that are new; how many were."""
        new = 0
        while start < end:
            number, first = divmod(start, _PAGE)
            stop = min(end, (number + 1) * _PAGE)
            last = first + stop - start
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = bytearray(_PAGE)
            at = page.find(0, first, last)
            while at >= 0:
                until = page.find(_SEEN, at, last)
                until = last if until < 0 else until
                page[at:until] = b"\x01" * (until - at)
                self._log(now, number * _PAGE + at, until - at, hit)
                new += until - at
                at = page.find(0, until, last)
            start = stop
        return new

    def _log(self, now: float, start: int, blocks: int, hit: bool) -> None:
        count = len(self._starts)
        if (
            count
            and self._starts[-1] + self._blocks[-1] == start
            and self._at[-1] == now
            and bool(self._hits[-1]) == hit
        ):
            self._blocks[-1] += blocks
            return
        if count >= MAX_TOUCHES:
            self.dropped_touches += 1
            return
        self._at.append(now)
        self._starts.append(start)
        self._blocks.append(blocks)
        self._hits.append(hit)

    # --- the reader's side

    def first_reads(self) -> Iterator[FirstRead]:
        """The first touches, in order."""
        rows = zip(self._at, self._starts, self._blocks, self._hits, strict=True)
        return (FirstRead(at, start, blocks, bool(hit)) for at, start, blocks, hit in rows)

    def ends_at(self) -> float | None:
        """When the start counts as over if nothing new is read; None before the first read."""
        return self.ended if self.ended is not None else self._calm.ends_at()

    def end(self) -> None:
        """The start is over: from here on only totals and waits are kept."""
        if self.ended is None:
            self.ended = self._clock()
            self._pages.clear()
