"""Where chunks begin and end: fixed offsets in large files, groups of small ones. Pure.

The rule is part of the format: it decides identities. A large file starts a chunk and is cut at
fixed offsets from its own start. Small files stand in groups; a group ends before it would grow
over the target, or after a file whose base name says so. The base name, not the content, decides:
a changed file then re-cuts nothing, and an inserted one its own neighbourhood only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from imagecache.chunks import BLOCK, MAX_CHUNK_BLOCKS, ZERO_BLOCK


@dataclass(frozen=True, slots=True)
class CutRule:
    """Sizes, in blocks, that steer the cutting; a format version fixes one set of them."""

    target_blocks: int = MAX_CHUNK_BLOCKS
    least_group_blocks: int = 16

    def is_large(self, size: int) -> bool:
        """Whether a file of `size` bytes is cut by itself and never grouped."""
        return size > self.target_blocks * BLOCK

    def ends_group(self, group_blocks: int, file_blocks: int, base_name: bytes) -> bool:
        """Whether a group of `group_blocks`, its last file included, ends after that file.

        Beyond the least size a boundary is as likely per block as makes the expected group reach
        the target; XXH3 is a dice here, not an address.
        """
        if group_blocks < self.least_group_blocks:
            return False
        span = self.target_blocks - self.least_group_blocks
        return xxhash.xxh3_64_intdigest(base_name) % span < file_blocks


FORMAT_CUT_RULE = CutRule()


def blocks_of(size: int) -> int:
    """Blocks that `size` bytes occupy."""
    return -(-size // BLOCK)


def zero_runs(padded: bytes | bytearray | memoryview) -> Iterator[tuple[bool, int, int]]:
    """Runs of a buffer of whole blocks as (is zero, first block, blocks), in order.

    One search settles the usual case, a buffer without a block's length of zeros.
    """
    total = len(padded) // BLOCK
    whole = bytes(padded)
    if ZERO_BLOCK not in whole:
        if total:
            yield False, 0, total
        return
    start, was_zero = 0, whole[:BLOCK] == ZERO_BLOCK
    for block in range(1, total):
        is_zero = whole[block * BLOCK : (block + 1) * BLOCK] == ZERO_BLOCK
        if is_zero != was_zero:
            yield was_zero, start, block - start
            start, was_zero = block, is_zero
    yield was_zero, start, total - start


def squeeze(padded: bytes | bytearray) -> tuple[bytes, tuple[tuple[bool, int], ...]]:
    """A buffer without its all-zero blocks, and its runs as (is zero, blocks).

    The first is a chunk's plaintext (empty when everything is zero), the second says how it lies.
    """
    runs = tuple(zero_runs(padded))
    if all(not is_zero for is_zero, _, _ in runs):
        return bytes(padded), tuple((False, blocks) for _, _, blocks in runs)
    kept = b"".join(
        padded[start * BLOCK : (start + blocks) * BLOCK]
        for is_zero, start, blocks in runs
        if not is_zero
    )
    return kept, tuple((is_zero, blocks) for is_zero, _, blocks in runs)
