"""Which ranged reads bring which chunks: neighbours in a pack come in one GET. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imagecache.blockimage.locations import Location

MAX_CHUNKS = 32  # 8 MiB of plaintext at most


@dataclass(frozen=True, slots=True)
class Get:
    """One ranged read of a pack, in stored bytes; `members` index the locations it brings."""

    pack: bytes
    offset: int
    length: int
    members: tuple[int, ...]


def plan_gets(
    locations: Sequence[Location], *, max_bytes: int, max_gap: int, max_chunks: int = MAX_CHUNKS
) -> list[Get]:
    """The reads for chunks at `locations`, ordered by the place of their first member.

    Two chunks share a read when at most `max_gap` bytes that nobody wants lie between them and the
    read stays within `max_bytes` and `max_chunks`; a chunk larger than that is read alone. What is
    stored may be a hundredth of what it becomes, so bytes alone bound no memory.
    """
    order = sorted(range(len(locations)), key=lambda n: (locations[n].pack, locations[n].offset, n))
    gets: list[Get] = []
    group: list[int] = []
    start = end = 0
    for number in order:
        place = locations[number]
        stop = max(end, place.offset + place.stored_length)
        if (
            group
            and locations[group[0]].pack == place.pack
            and place.offset <= end + max_gap
            and stop - start <= max_bytes
            and len(group) < max_chunks
        ):
            group.append(number)
            end = stop
            continue
        if group:
            gets.append(Get(locations[group[0]].pack, start, end - start, tuple(group)))
        group, start, end = [number], place.offset, place.offset + place.stored_length
    if group:
        gets.append(Get(locations[group[0]].pack, start, end - start, tuple(group)))
    gets.sort(key=lambda get: min(get.members))
    return gets
