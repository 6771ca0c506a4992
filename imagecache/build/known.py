"""Chunks that the realm already stores, read from the indexes and tables of reference layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imagecache.blockimage import layerindex, manifest
from imagecache.blockimage.extents import ChunkList
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import Location, LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.errors import Corrupt
from imagecache.packs.pack import TARGET_BYTES

SPARE_PACKS = 16
"""Packs of other images that any image may name, beyond twice as many as its bytes would fill."""

Locations = Mapping[bytes, Location]
_NONE: dict[bytes, Location] = {}


@dataclass(frozen=True, slots=True)
class KnownChunks:
    """What need not be stored again: `image` by lower layers of the same image, always reused;
    `references` by other images, reused in runs that are long enough."""

    image: Locations = field(default_factory=lambda: _NONE)
    references: Locations = field(default_factory=lambda: _NONE)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.image or digest in self.references


def read_chunks(plaintext: bytes) -> ChunkList:
    """The chunks of a layer index or a block manifest, told apart by their magic."""
    if plaintext.startswith(layerindex.MAGIC):
        return LayerIndex.decode(plaintext).chunks
    if plaintext.startswith(manifest.MAGIC):
        return BlockManifest.decode(plaintext).chunks
    raise Corrupt("neither a layer index nor a block manifest")


def known_chunks(pairs: Sequence[tuple[Path, Path]]) -> dict[bytes, Location]:
    """Digest -> location over (index or manifest, location table) files; the first one wins."""
    known: dict[bytes, Location] = {}
    for subject_path, table_path in pairs:
        chunks = read_chunks(subject_path.read_bytes())
        table = LocationTable.decode(table_path.read_bytes())
        if len(table) != len(chunks):
            raise Corrupt("a location table has another number of chunks than its subject")
        for ordinal, (digest, _) in enumerate(chunks):
            if digest not in known:
                known[digest] = table.locate(ordinal)
    return known


def in_few_packs(known: Locations) -> dict[bytes, Location]:
    """The known chunks of the packs that hold most of them: over many versions of an image, what
    old packs still give would become slivers, each of which keeps a whole pack from collection.

    The cap is twice as many packs as the known bytes would fill, and `SPARE_PACKS`.
    """
    held: Counter[bytes] = Counter()
    for place in known.values():
        held[place.pack] += place.stored_length
    cap = 2 * -(-held.total() // TARGET_BYTES) + SPARE_PACKS
    if len(held) <= cap:
        return dict(known)
    kept = set(sorted(held, key=lambda pack: (-held[pack], pack))[:cap])
    return {digest: place for digest, place in known.items() if place.pack in kept}
