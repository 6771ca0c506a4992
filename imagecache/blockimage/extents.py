"""Extents: which chunk, or zeros, lies where on a virtual disk. Packed arrays and bisect."""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from imagecache.chunks import DIGEST_BYTES, MAX_CHUNK_BLOCKS
from imagecache.errors import Corrupt

ZEROS = 0xFFFFFFFF
"""The chunk ordinal of a piece that is all zeros."""

MAX_DISK_BLOCKS = 1 << 32
MAX_CHUNKS = 1 << 26
_PIECE = struct.Struct("<II")


def packed(values: Iterable[int], typecode: str) -> bytes:
    """Little-endian bytes of unsigned integers; `typecode` is array's H, I or Q."""
    column = array(typecode, values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()


def unpacked(raw: bytes | memoryview, typecode: str) -> array[int]:
    """The inverse of `packed`."""
    column = array(typecode)
    column.frombytes(raw)
    if sys.byteorder == "big":
        column.byteswap()
    return column


@dataclass(frozen=True, slots=True)
class ChunkList:
    """The distinct chunks of a region or disk by ordinal: their digests and sizes in blocks."""

    digests: bytes  # 32 bytes each, one after another
    sizes: array[int]  # blocks, typecode H

    def __len__(self) -> int:
        return len(self.sizes)

    def digest(self, ordinal: int) -> bytes:
        """The digest of one chunk."""
        return self.digests[ordinal * DIGEST_BYTES : (ordinal + 1) * DIGEST_BYTES]

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        for ordinal, blocks in enumerate(self.sizes):
            yield self.digest(ordinal), blocks


@dataclass(frozen=True, slots=True)
class Pieces:
    """A gapless run of pieces from block 0: each some blocks of one chunk, or zeros.

    A chunk's blocks are used in order: the pieces that name it, up to its size, follow each other
    with nothing but zeros between them. So a piece's offset in its chunk need not be stored.
    """

    blocks: array[int]  # typecode I
    ordinals: array[int]  # typecode I; ZEROS for a hole

    @property
    def total_blocks(self) -> int:
        """Blocks that all pieces cover."""
        return sum(self.blocks)


class ExtentMap:
    """The non-zero extents of a disk, in order; what no extent covers reads as zeros.

    Parallel arrays by extent: `starts` and `lengths` in blocks of the disk, `ordinals` of chunks,
    and `offsets`, the blocks inside the chunk at which the extent begins.
    """

    __slots__ = ("disk_blocks", "lengths", "offsets", "ordinals", "starts")

    def __init__(self, pieces: Pieces, chunks: ChunkList) -> None:
        """Raises Corrupt where pieces and chunks disagree (D2)."""
        self.starts = array("I")
        self.lengths = array("I")
        self.ordinals = array("I")
        self.offsets = array("H")
        self.disk_blocks = self._lay(pieces, chunks)

    def _lay(self, pieces: Pieces, chunks: ChunkList) -> int:
        at = 0
        current, used, size = ZEROS, 0, 0
        sizes = chunks.sizes
        known = len(sizes)
        for blocks, ordinal in zip(pieces.blocks, pieces.ordinals, strict=True):
            if not blocks:
                raise Corrupt("an extent of zero blocks")
            if ordinal != ZEROS:
                if ordinal >= known:
                    raise Corrupt(f"an extent names chunk {ordinal} of {known}")
                if used == size:
                    current, used, size = ordinal, 0, sizes[ordinal]
                if ordinal != current or used + blocks > size:
                    raise Corrupt("an extent begins before the chunk ahead of it is complete")
                self.starts.append(at)
                self.lengths.append(blocks)
                self.ordinals.append(ordinal)
                self.offsets.append(used)
                used += blocks
            at += blocks
            if at > MAX_DISK_BLOCKS:
                raise Corrupt("a disk of more than 2^32 blocks")
        if used != size:
            raise Corrupt("the last chunk is not complete")
        return at

    def __len__(self) -> int:
        return len(self.starts)

    def find(self, block: int) -> int:
        """The index of the last extent that starts at or before `block`, or -1."""
        return bisect_right(self.starts, block) - 1

    def overlapping(self, start_block: int, end_block: int) -> range:
        """The indexes of the extents that touch [start_block, end_block)."""
        first = self.find(start_block)
        if first < 0 or self.starts[first] + self.lengths[first] <= start_block:
            first += 1
        return range(first, bisect_right(self.starts, end_block - 1))


class PieceBuilder:
    """Collects pieces in disk order and numbers the distinct chunks by first appearance."""

    def __init__(self) -> None:
        self._ordinal_of: dict[bytes, int] = {}
        self._sizes = array("H")
        self._blocks = array("I")
        self._ordinals = array("I")
        self.total_blocks = 0

    def zeros(self, blocks: int) -> None:
        """Adds a hole; neighbouring holes become one."""
        if not blocks:
            return
        self.total_blocks += blocks
        while blocks:
            if self._ordinals and self._ordinals[-1] == ZEROS:
                room = min(blocks, 0xFFFFFFFF - self._blocks[-1])
                self._blocks[-1] += room
                blocks -= room
                if not blocks:
                    return
            step = min(blocks, 0xFFFFFFFF)
            self._blocks.append(step)
            self._ordinals.append(ZEROS)
            blocks -= step

    def chunk(self, digest: bytes, runs: Sequence[tuple[bool, int]]) -> None:
        """Adds one chunk that lies as `runs` of (is zero, blocks) say."""
        size = sum(blocks for is_zero, blocks in runs if not is_zero)
        ordinal = self._ordinal_of.setdefault(digest, len(self._sizes))
        if ordinal == len(self._sizes):
            self._sizes.append(size)
        for is_zero, blocks in runs:
            if is_zero:
                self.zeros(blocks)
            else:
                self._blocks.append(blocks)
                self._ordinals.append(ordinal)
                self.total_blocks += blocks

    def append(self, pieces: Pieces, chunks: ChunkList) -> None:
        """Adds another gapless run (a layer's region) behind what is there."""
        renumbered = array("I")
        for digest, blocks in chunks:
            ordinal = self._ordinal_of.setdefault(digest, len(self._sizes))
            if ordinal == len(self._sizes):
                self._sizes.append(blocks)
            renumbered.append(ordinal)
        for blocks, ordinal in zip(pieces.blocks, pieces.ordinals, strict=True):
            if ordinal == ZEROS:
                self.zeros(blocks)
            else:
                self._blocks.append(blocks)
                self._ordinals.append(renumbered[ordinal])
                self.total_blocks += blocks

    def finish(self) -> tuple[ChunkList, Pieces]:
        """The distinct chunks and the pieces."""
        chunks = ChunkList(b"".join(self._ordinal_of), self._sizes)
        return chunks, Pieces(self._blocks, self._ordinals)


def encode_chunks_and_pieces(chunks: ChunkList, pieces: Pieces) -> bytes:
    """Digests (32 bytes each), sizes (u16 each), piece blocks (u32 each), ordinals (u32 each)."""
    return b"".join(
        (
            chunks.digests,
            packed(chunks.sizes, "H"),
            packed(pieces.blocks, "I"),
            packed(pieces.ordinals, "I"),
        )
    )


def columns_length(chunk_count: int, piece_count: int) -> int:
    """Bytes that `encode_chunks_and_pieces` writes for these counts."""
    return chunk_count * (DIGEST_BYTES + 2) + piece_count * _PIECE.size


def decode_chunks_and_pieces(
    columns: memoryview, chunk_count: int, piece_count: int
) -> tuple[ChunkList, Pieces]:
    """The inverse of `encode_chunks_and_pieces`; raises Corrupt for sizes outside the format."""
    if chunk_count > MAX_CHUNKS or piece_count > 2 * MAX_CHUNKS:
        raise Corrupt(f"{chunk_count} chunks in {piece_count} pieces are over the format's cap")
    if len(columns) != columns_length(chunk_count, piece_count):
        raise Corrupt("an index has a wrong length for its counts")
    at = chunk_count * DIGEST_BYTES
    digests = bytes(columns[:at])
    sizes = unpacked(columns[at : at + 2 * chunk_count], "H")
    at += 2 * chunk_count
    blocks = unpacked(columns[at : at + 4 * piece_count], "I")
    ordinals = unpacked(columns[at + 4 * piece_count :], "I")
    if chunk_count and not 0 < min(sizes) <= max(sizes) <= MAX_CHUNK_BLOCKS:
        raise Corrupt("an index names a chunk of no blocks, or over the cap")
    return ChunkList(digests, sizes), Pieces(blocks, ordinals)
