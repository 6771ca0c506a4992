"""Which known chunks of other images are used again: those in runs that are long enough.

A known chunk alone among new ones saves its bytes once, and costs every later reader a GET of its
own; version by version an image would fall into such pieces. So the number of runs is bounded by
the image's size. It decides locations, never identities.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from imagecache.blockimage.locations import Location

LEAST_RUN_BYTES = 512 << 10
"""Stored bytes of the shortest run; four times as many bytes of plaintext do as well."""

_PLAIN_FACTOR = 4
GAP_BYTES = 64 << 10
"""What may lie between two chunks of one run: readers ahead of demand read over such a gap."""

T = TypeVar("T")


class ReuseRuns(Generic[T]):
    """Takes the known chunks in the order of the layer; `reused` has those that count.

    Chunks are held until their run is long enough: at most `least_bytes` of stored bytes or four
    times as many of plaintext, and one chunk.
    """

    def __init__(self, least_bytes: int) -> None:
        self.reused: dict[bytes, Location] = {}
        self._least = least_bytes
        self._held: dict[bytes, tuple[Location, T]] = {}
        self._stored = self._plain = 0
        self._last: Location | None = None

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.reused or digest in self._held

    def add(self, digest: bytes, place: Location, chunk: T, plain_bytes: int) -> list[T]:
        """Takes the next known chunk; what a run that ended before it leaves to be stored."""
        left: list[T] = []
        if not self._follows(place):
            left = self.end()
        self._last = place
        self._stored += place.stored_length
        self._plain += plain_bytes
        self._held[digest] = (place, chunk)
        if self._stored >= self._least or self._plain >= _PLAIN_FACTOR * self._least:
            self.reused.update((held, at) for held, (at, _) in self._held.items())
            self._held.clear()
        return left

    def _follows(self, place: Location) -> bool:
        last = self._last
        if last is None or last.pack != place.pack:
            return False
        return 0 <= place.offset - last.offset - last.stored_length <= GAP_BYTES

    def end(self) -> list[T]:
        """Ends the run before a chunk that is new, or the layer; what is left to be stored."""
        left = [chunk for _, chunk in self._held.values()]
        self._held.clear()
        self._stored = self._plain = 0
        self._last = None
        return left
