"""A block image as its exports read it: extents by byte offset, chunk positions, locations."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator

from imagecache.blockimage.locations import Location, LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.blockimage.seals import NO_SEALS, Seals
from imagecache.cache.aheadplan import FileRuns
from imagecache.cache.sharedfill import SharedFill
from imagecache.cache.slots import NO_SERIAL
from imagecache.chunks import BLOCK, DIGEST_BYTES
from imagecache.errors import Corrupt

HOLE = -1
_MAX_HINTS = 1 << 16
_LEAST_SHIFT = 18  # a granule of the hint table is at least 256 KiB


class ImageMap:
    """Packed arrays over one image's extents and chunks, shared by all its exports.

    By extent, in bytes of the disk: `starts`, `ends`, `ordinals` (of chunks), and `deltas`, which
    added to a disk offset give the offset inside the chunk. `hints[offset >> shift]` narrows the
    bisection. By chunk: `slots` and `known`, where the chunk was last seen in the arena and the
    serial of that slot then; a position holds while the arena's serial is still the same.
    """

    def __init__(
        self,
        manifest: BlockManifest,
        locations: LocationTable,
        pack_key: Callable[[bytes], str],
        seals: Seals = NO_SEALS,
    ) -> None:
        """`pack_key` makes the store's key of a pack's name; Corrupt where the two disagree."""
        chunks, extents = manifest.chunks, manifest.extents
        if len(locations) != len(chunks):
            raise Corrupt(f"{len(locations)} locations for {len(chunks)} chunks of a block image")
        self.seals = seals
        self.size_bytes = manifest.size_bytes
        self.metadata_bytes = manifest.metadata_blocks * BLOCK
        self.starts = array("Q", [start * BLOCK for start in extents.starts])
        self.ends = array(
            "Q",
            [(s + n) * BLOCK for s, n in zip(extents.starts, extents.lengths, strict=True)],
        )
        self.deltas = array(
            "q",
            [(o - s) * BLOCK for o, s in zip(extents.offsets, extents.starts, strict=True)],
        )
        self.ordinals = extents.ordinals
        self.shift, self.hints = _hints(self.starts, self.size_bytes)
        self.slots = array("I", bytes(4 * len(chunks)))
        self.known = array("I", [NO_SERIAL]) * len(chunks)
        self.shared_fill = SharedFill()
        self.files: FileRuns | None = None  # once somebody wanted to know
        self._digests = chunks.digests
        self._sizes = chunks.sizes
        self._locations = locations
        self._pack_key = pack_key

    @property
    def chunk_count(self) -> int:
        """Distinct chunks."""
        return len(self._sizes)

    @property
    def chunk_bytes(self) -> int:
        """Plaintext bytes of the distinct chunks: what the image takes in the arena."""
        return sum(self._sizes) * BLOCK

    @property
    def stored_bytes(self) -> int:
        """Bytes of the distinct chunks as the store holds them."""
        return sum(self._locations.stored_lengths)

    def digest(self, ordinal: int) -> bytes:
        """The digest of a chunk."""
        return self._digests[ordinal * DIGEST_BYTES : (ordinal + 1) * DIGEST_BYTES]

    def length(self, ordinal: int) -> int:
        """The plaintext bytes of a chunk."""
        return self._sizes[ordinal] * BLOCK

    def stored_length(self, ordinal: int) -> int:
        """The stored bytes of a chunk."""
        return self._locations.stored_lengths[ordinal]

    def location(self, ordinal: int) -> Location:
        """Where the store keeps a chunk."""
        return self._locations.locate(ordinal)

    def pack_key(self, pack: bytes) -> str:
        """The store's key of a pack."""
        return self._pack_key(pack)

    def digests(self) -> Iterator[bytes]:
        """The digests of all chunks."""
        return map(self.digest, range(self.chunk_count))

    @property
    def packs(self) -> tuple[bytes, ...]:
        """The names of the packs that hold the chunks."""
        return self._locations.packs

    def relocate(self, locations: LocationTable) -> None:
        """The store keeps the chunks elsewhere from now on; Corrupt for another image's table."""
        if len(locations) != self.chunk_count or locations.subject != self._locations.subject:
            raise Corrupt("a location table of another block image")
        self._locations = locations

    def pack_order(self) -> list[int]:
        """All chunks in the order in which large reads of the packs bring them."""
        packs, offsets = self._locations.pack_ordinals, self._locations.offsets
        return sorted(range(self.chunk_count), key=lambda n: (packs[n], offsets[n]))

    def find(self, offset: int) -> int:
        """The index of the last extent that starts at or before a disk offset, or -1."""
        granule = offset >> self.shift
        low, high = self.hints[granule], self.hints[granule + 1]
        return bisect_right(self.starts, offset, low, high) - 1

    def pieces(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, extent index or HOLE) of what lies in [offset, end), gapless, in order."""
        starts, ends = self.starts, self.ends
        index = self.find(offset) if offset < end else 0
        while offset < end:
            if index >= 0 and offset < ends[index]:
                stop = min(ends[index], end)
                yield offset, stop, index
            else:
                stop = min(starts[index + 1], end) if index + 1 < len(starts) else end
                yield offset, stop, HOLE
            offset = stop
            if index + 1 < len(starts) and starts[index + 1] <= offset:
                index += 1

    def ordinals_in(self, offset: int, end: int) -> list[int]:
        """The distinct chunks of [offset, end), in disk order."""
        ordinals = self.ordinals
        found = (ordinals[index] for _, _, index in self.pieces(offset, end) if index >= 0)
        return list(dict.fromkeys(found))


def _hints(starts: array[int], size: int) -> tuple[int, array[int]]:
    shift = _LEAST_SHIFT
    while size >> shift > _MAX_HINTS:
        shift += 1
    granules = range((size >> shift) + 2)
    return shift, array("I", [bisect_left(starts, granule << shift) for granule in granules])
