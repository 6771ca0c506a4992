"""Between the disk and files: reads become touches, touches become chunks of one image. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from imagecache.chunks import BLOCK
from imagecache.errors import NotFound
from imagecache.flatten import kinds
from imagecache.imageview import FileSpan, ImageView
from imagecache.profile.merge import union
from imagecache.profile.profile import MAX_TOUCHES, MetadataRange, Profile, Touch
from imagecache.profile.recorder import FirstRead

FEW_METADATA_BYTES = 1 << 20
"""Stored bytes of metadata up to which a boot pack takes all of it: 10 ms at 100 MB/s."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """Blocks of one file on the disk; `start_block` counts from the file's start."""

    path: bytes
    start_block: int
    blocks: int


def parts_at(view: ImageView, start_block: int, blocks: int) -> Iterator[FilePart | MetadataRange]:
    """The files, and the parts of the metadata region, that a range of the disk holds."""
    manifest = view.manifest
    end = start_block + blocks
    if start_block < manifest.metadata_blocks:
        stop = min(end, manifest.metadata_blocks)
        yield MetadataRange(start_block, stop - start_block)
        start_block = stop
    while start_block < end:
        found = view.path_at(start_block * BLOCK)
        if found is None:
            # A gap between regions: nothing until the next layer begins.
            starts = [layer.start_block for layer in manifest.layers]
            after = bisect_right(starts, start_block)
            if after == len(starts):
                return
            start_block = starts[after]
            continue
        path, inside = found
        first = inside // BLOCK
        size = _blocks_of(view, start_block - first)
        stop = min(end, start_block - first + size)
        yield FilePart(path, first, stop - start_block)
        start_block = stop


def _blocks_of(view: ImageView, disk_block: int) -> int:
    """The blocks of the file whose content begins at a disk block."""
    placed = view.manifest.layers
    layer = bisect_right(placed, disk_block, key=lambda x: x.start_block) - 1
    blocks = view.file_blocks(layer, disk_block - placed[layer].start_block)
    return max(1, blocks)


def profile_of(
    view: ImageView, image: str, block_image: bytes, reads: Iterable[FirstRead]
) -> Profile:
    """A recording as a profile of one source."""
    touches: list[Touch] = []
    metadata: list[MetadataRange] = []
    for read in reads:
        for part in parts_at(view, read.start_block, read.blocks):
            if isinstance(part, MetadataRange):
                metadata.append(part)
                continue
            last = touches[-1] if touches else None
            if (
                last is not None
                and last.path == part.path
                and last.start_block + last.blocks == part.start_block
            ):
                touches[-1] = Touch(part.path, last.start_block, last.blocks + part.blocks)
            elif len(touches) < MAX_TOUCHES:
                touches.append(Touch(part.path, part.start_block, part.blocks))
    return Profile(image, block_image, 1, tuple(touches), union(metadata))


class Files:
    """Regular files of one image by path, each looked up once; symlinks in the way are followed.

    A hard-linked file answers to each of its names.
    """

    def __init__(self, view: ImageView) -> None:
        self._view = view
        self._spans: dict[bytes, FileSpan | None] = {}

    def span(self, path: bytes) -> FileSpan | None:
        """Where the file's content lies; None where the image has no regular file there."""
        if path not in self._spans:
            try:
                real, node = self._view.resolve(path)
            except NotFound:
                found = None
            else:
                found = self._view.span(real, node) if node.kind == kinds.REGULAR else None
            self._spans[path] = found
        return self._spans[path]

    def size_blocks(self, path: bytes) -> int | None:
        """The file's size in blocks, or None."""
        span = self.span(path)
        return None if span is None else len(span.blocks)


def ordinals_of(view: ImageView, profile: Profile, stored_lengths: Sequence[int]) -> list[int]:
    """The chunks that a start with this profile reads, in the order in which they should come.

    Metadata first: all of it where it is few bytes or where the profile names none (it was carried
    over), else what was touched; then file data by first touch. Paths that are gone are left out.
    """
    extents = view.manifest.extents
    whole = extents.overlapping(0, view.manifest.metadata_blocks)
    every = dict.fromkeys(extents.ordinals[n] for n in whole)
    few = sum(stored_lengths[n] for n in every) <= FEW_METADATA_BYTES
    found: dict[int, None] = {}
    if few or not profile.metadata:
        found.update(every)
    else:
        for part in profile.metadata:
            _add(view, found, part.start_block, part.blocks)
    files = Files(view)
    for touch in profile.touches:
        span = files.span(touch.path)
        if span is None:
            continue
        blocks = min(touch.blocks, len(span.blocks) - touch.start_block)
        if blocks > 0:
            _add(view, found, span.blocks.start + touch.start_block, blocks)
    return list(found)


def _add(view: ImageView, found: dict[int, None], start_block: int, blocks: int) -> None:
    extents = view.manifest.extents
    for n in extents.overlapping(start_block, start_block + blocks):
        found.setdefault(extents.ordinals[n])
