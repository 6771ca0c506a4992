"""What a profile is: first touches of files in order, and ranges of the metadata region. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MAX_TOUCHES = 1 << 18
MAX_PATHS = 1 << 17
MAX_PATH_BYTES = 32 << 20
MAX_SOURCES = 1 << 16
MAX_PATH = 4096


@dataclass(frozen=True, slots=True)
class Touch:
    """Blocks of a file that a start read for the first time; `seen` in how many recordings.

    `start_block` counts from the file's start, in blocks of 4096 bytes.
    """

    path: bytes
    start_block: int
    blocks: int
    seen: int = 1


@dataclass(frozen=True, slots=True)
class MetadataRange:
    """Blocks of the metadata region, from the disk's start."""

    start_block: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Profile:
    """One image's start: `sources` recordings merged; 0 where it was only predicted.

    Metadata ranges hold for `block_image` alone; touches hold wherever the path does.
    """

    image: str  # manifest digest, `sha256:...`
    block_image: bytes
    sources: int
    touches: tuple[Touch, ...]
    metadata: tuple[MetadataRange, ...]

    @property
    def blocks(self) -> int:
        """File blocks that the touches name."""
        return sum(touch.blocks for touch in self.touches)

    @property
    def paths(self) -> int:
        """Distinct files."""
        return len({touch.path for touch in self.touches})
