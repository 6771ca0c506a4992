"""Which known chunks of other images are used again, so that an image does not fall into pieces.

A known chunk alone among new ones saves its bytes once, and costs every later reader a GET of its
own; version by version an image would fragment. So long runs are always used again, short ones
only while a layer has had few of them for its size, and the rest is stored anew, in order. It
decides locations, never identities.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from imagecache.blockimage.locations import Location

LEAST_RUN_BYTES = 1 << 20
"""Stored bytes from which a run counts as long; four times as many of plaintext do as well."""

SPARE_RUNS = 32
"""Short runs that any layer may have, and one more for each `BYTES_PER_RUN` of plaintext."""

BYTES_PER_RUN = 2 << 20
PLAIN_FACTOR = 4
GAP_BYTES = 64 << 10
"""What may lie between two chunks of one run: readers ahead of demand read over such a gap."""

T = TypeVar("T")


def most_runs(plain_bytes: int, stored_bytes: int) -> int:
    """The most runs of reused chunks in a layer of these sizes; between two of them, new chunks
    stand in one run each. So twice this and one bounds its runs, and thereby its GETs."""
    long = stored_bytes // LEAST_RUN_BYTES + plain_bytes // (PLAIN_FACTOR * LEAST_RUN_BYTES)
    return long + SPARE_RUNS + plain_bytes // BYTES_PER_RUN


class ReuseRuns(Generic[T]):
    """Takes the known chunks in the order of the layer; `reused` has those that count.

    Chunks are held until their run is long: at most `least_bytes` of stored bytes, or four times
    as many of plaintext, and one chunk.
    """

    def __init__(self, least_bytes: int) -> None:
        self.reused: dict[bytes, Location] = {}
        self._least = least_bytes
        self._held: dict[bytes, tuple[Location, T]] = {}
        self._stored = self._plain = 0
        self._last: Location | None = None
        self._passed = 0
        self._short_runs = 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.reused or digest in self._held

    def passed(self, plain_bytes: int) -> None:
        """Counts a chunk of the layer, known or new."""
        self._passed += plain_bytes

    def add(self, digest: bytes, place: Location, chunk: T, plain_bytes: int) -> list[T]:
        """Takes the next known chunk; what a run that ended before it leaves to be stored."""
        left: list[T] = []
        if not self._follows(place):
            left = self.end()
        self._last = place
        self._stored += place.stored_length
        self._plain += plain_bytes
        self._held[digest] = (place, chunk)
        if self._stored >= self._least or self._plain >= PLAIN_FACTOR * self._least:
            self._accept()
        return left

    def _accept(self) -> None:
        self.reused.update((digest, place) for digest, (place, _) in self._held.items())
        self._held.clear()

    def _follows(self, place: Location) -> bool:
        last = self._last
        if last is None or last.pack != place.pack:
            return False
        return 0 <= place.offset - last.offset - last.stored_length <= GAP_BYTES

    def end(self) -> list[T]:
        """Ends the run before a chunk that is new, or the layer; what is left to be stored."""
        if self._held and self._short_runs < SPARE_RUNS + self._passed // BYTES_PER_RUN:
            self._short_runs += 1
            self._accept()
        left = [chunk for _, chunk in self._held.values()]
        self._held.clear()
        self._stored = self._plain = 0
        self._last = None
        return left
