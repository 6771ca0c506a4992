"""Counts of the read path: plain numbers that only grow, for whoever asks."""

from __future__ import annotations

from dataclasses import dataclass, field

from imagecache.buckets import Buckets
from imagecache.cache.events import Cause
from imagecache.store.base import Priority


@dataclass(slots=True)
class ClassCounters:
    """Of one class of reads. Waste and hits are the arena's and the devices' to count."""

    gets: int = 0
    bytes_fetched: int = 0
    chunks: int = 0
    failures: int = 0


@dataclass(slots=True)
class FetchCounters:
    """Plain counts since the start."""

    by_class: tuple[ClassCounters, ...] = field(
        default_factory=lambda: tuple(ClassCounters() for _ in Priority)
    )
    joins: int = 0  # demand that found its chunk on its way
    upgrades: int = 0  # flights that were queued ahead and became demand
    first_uses: int = 0  # local copies that were compared and right
    corrupt_bodies: int = 0  # chunks that the store sent wrong: alert
    repaired: int = 0  # of these, right when asked for again
    dropped_ahead: int = 0
    overtakes: int = 0  # demand that did not wait for a stream to bring its chunk
    waits: dict[Cause, Buckets] = field(  # of all exports' reads, those that are gone too
        default_factory=lambda: {cause: Buckets() for cause in Cause}
    )


@dataclass(slots=True)
class DeviceCounters:
    """Of one export. `misses` are reads that waited; the server counts all reads."""

    misses: int = 0
    errors: int = 0
    waited_seconds: float = 0.0
    copies: int = 0
