"""What an arena and a fetcher may use, and what the arena tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from imagecache.cache.slotfile import SLOT_BYTES


class Integrity(StrEnum):
    """When bytes on disk are checked: before they first are shown, or before each time."""

    ADMISSION = "admission"
    EVERY_READ = "every-read"


@dataclass(frozen=True, slots=True)
class ArenaSettings:
    """Sizes in bytes; the file is `overcommit` times the budget, sparse, for small chunks."""

    budget_bytes: int = 20 << 30
    integrity: Integrity = Integrity.ADMISSION
    overcommit: int = 4
    workers: int = 2
    retry_seconds: float = 5.0  # after the disk refused a write, until the next one is tried
    scrub_bytes_per_second: int = 4 << 20  # 0: no scrub

    @property
    def slot_count(self) -> int:
        """Slots in the file, one at least."""
        return max(1, self.budget_bytes * self.overcommit // SLOT_BYTES)


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """A moment's counts; bytes are those that slots occupy on disk."""

    chunks: int
    used_bytes: int
    budget_bytes: int
    unchecked: int  # present, not yet compared with their digest since the start
    pinned: int
    leased: int
    admitted: int
    refused: int  # verified chunks that were passed through, not kept
    evicted: int
    wasted_ahead: int  # fetched ahead of anybody's asking, and evicted unread
    checked: int  # comparisons with a digest: first uses, scrubs, copies
    quarantined: int
    degraded: str | None  # why nothing is written at the moment


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """Times in seconds, sizes in bytes, GETs under way per class.

    The reader has budgets of its own; these should not be above them, because what waits there can
    no longer be overtaken.
    """

    stall_seconds: float = 30.0  # how long a read waits before it is an error
    attempt_seconds: float = 30.0  # how long one GET may take, the reader's retries included
    retry_first_seconds: float = 0.1
    retry_most_seconds: float = 2.0
    max_get_bytes: int = 4 << 20
    demand_gap_bytes: int = 0  # a gap costs bytes and saves GETs; demand reads run side by side
    ahead_gap_bytes: int = 64 << 10
    demand_gets: int = 32
    prefetch_gets: int = 8
    fill_gets: int = 2
    max_queued_ahead: int = 4096  # chunks; what is asked for ahead beyond it is dropped
    decoders: int = 2
