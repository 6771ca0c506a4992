"""Merging recordings of one image, and carrying a profile over to another version. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from imagecache.errors import UsageError
from imagecache.profile.profile import MAX_TOUCHES, MetadataRange, Profile, Touch

_RARE = 4
"""From this many recordings on, what fewer than a fourth of them read is left out."""


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """One profile of the same image's recordings, each weighted by its own sources.

    A block's place is the mean of its places in the recordings that read it, each counted from 0
    (first) to 1 (last), so that recordings of different lengths count alike.
    """
    if len({profile.block_image for profile in profiles}) != 1:
        raise UsageError("profiles of different images do not merge", remedy="profile apply")
    if len(profiles) == 1:
        return profiles[0]
    sources = sum(profile.sources for profile in profiles)
    places: dict[tuple[bytes, int], list[float]] = {}  # block -> [sum of places, weight]
    for profile in profiles:
        total = max(1, profile.blocks)
        at = 0
        for touch in profile.touches:
            # A prediction has no recording behind it, but what it names is not nothing.
            weight = touch.seen if profile.sources else 0.5
            for block in range(touch.start_block, touch.start_block + touch.blocks):
                place = places.setdefault((touch.path, block), [0.0, 0.0])
                place[0] += weight * (at / total)
                place[1] += weight
                at += 1
    least = sources / _RARE if sources >= _RARE else 0.0
    kept = (item for item in places.items() if item[1][1] >= least)
    ordered = sorted(kept, key=lambda item: (item[1][0] / item[1][1], item[0]))
    touches = _joined((path, block, max(1, int(w))) for (path, block), (_, w) in ordered)
    ranges = (part for profile in profiles for part in profile.metadata)
    return Profile(
        image=profiles[0].image,
        block_image=profiles[0].block_image,
        sources=sources,
        touches=tuple(touches[:MAX_TOUCHES]),
        metadata=union(ranges),
    )


def _joined(blocks: Iterable[tuple[bytes, int, int]]) -> list[Touch]:
    """Touches of blocks in order; those that follow each other in one file become one."""
    touches: list[Touch] = []
    path, start, end, seen = b"", 0, 0, 0
    for next_path, block, times in blocks:
        if end > start and next_path == path and block == end and times == seen:
            end += 1
            continue
        if end > start:
            touches.append(Touch(path, start, end - start, seen))
        path, start, end, seen = next_path, block, block + 1, times
    if end > start:
        touches.append(Touch(path, start, end - start, seen))
    return touches


def union(ranges: Iterable[MetadataRange]) -> tuple[MetadataRange, ...]:
    """The ranges in disk order, those that touch joined."""
    found: list[list[int]] = []
    for start, end in sorted((part.start_block, part.start_block + part.blocks) for part in ranges):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return tuple(MetadataRange(start, end - start) for start, end in found)


def carry_over(
    profile: Profile,
    image: str,
    block_image: bytes,
    size_of: Callable[[bytes], int | None],
) -> Profile:
    """The profile as one of another version: by path, dead entries dropped, cut to the new sizes.

    `size_of` is a regular file's size in blocks in the new version, None where it has none. The
    metadata region of another image says nothing about this one's, so its ranges are dropped.
    """
    touches = []
    known: dict[bytes, int | None] = {}
    for touch in profile.touches:
        if touch.path not in known:
            known[touch.path] = size_of(touch.path)
        size = known[touch.path]
        if size is None or touch.start_block >= size:
            continue
        blocks = min(touch.blocks, size - touch.start_block)
        touches.append(Touch(touch.path, touch.start_block, blocks, touch.seen))
    same = block_image == profile.block_image
    return Profile(
        image=image,
        block_image=block_image,
        sources=profile.sources,
        touches=tuple(touches),
        metadata=profile.metadata if same else (),
    )
