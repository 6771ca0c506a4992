"""Where things stand on a block image's virtual disk: the metadata window, then the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imagecache.errors import LimitExceeded

BLOCK = 4096
FIRST_WINDOW_BLOCKS = (64 << 20) // BLOCK
REGION_ALIGN_BLOCKS = (2 << 20) // BLOCK
MAX_DISK_BLOCKS = (1 << 32) - 2  # both faces count blocks in 32 bits; all ones mean "none"


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Addresses on the disk, in blocks of 4096 bytes."""

    window_blocks: int
    layer_start_blocks: tuple[int, ...]
    disk_blocks: int


@dataclass(frozen=True, slots=True)
class MetadataRegion:
    """A face's bytes: sections that follow one another from block 0, each of whole blocks.

    Sections in order: head, one per layer (may be empty), directories. A layer's section does not
    change while the layers up to it are the same (but for links that upper layers add or take).
    """

    sections: tuple[bytes, ...]
    total_blocks: int
    plan: DiskPlan


def plan_disk(metadata_blocks: int, layer_blocks: Sequence[int]) -> DiskPlan:
    """The window (64 MiB, doubled until the metadata fits) and each layer's 2 MiB-aligned start.

    Raises `LimitExceeded` for a disk of 16 TiB or more.
    """
    window = FIRST_WINDOW_BLOCKS
    while window < metadata_blocks:
        window *= 2
    starts: list[int] = []
    end = window
    for blocks in layer_blocks:
        start = -(-end // REGION_ALIGN_BLOCKS) * REGION_ALIGN_BLOCKS
        starts.append(start)
        end = start + blocks
    if end > MAX_DISK_BLOCKS:
        raise LimitExceeded(f"the image needs a disk of {end} blocks, over {MAX_DISK_BLOCKS}")
    return DiskPlan(window, tuple(starts), end)
