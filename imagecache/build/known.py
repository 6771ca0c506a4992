"""Chunks that the realm already stores, read from the indexes and tables of reference layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imagecache.blockimage import layerindex, manifest
from imagecache.blockimage.extents import ChunkList
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import Location, LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.errors import Corrupt


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
