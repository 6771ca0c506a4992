"""Layer indexes -> one block image: merged tree, metadata region, manifest, location table.

Runs in a worker process: a merge of many files costs seconds of one core.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from imagecache.blockimage.extents import PieceBuilder
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest, Face, PlacedLayer
from imagecache.blockimage.seals import PackKey
from imagecache.build.chunksink import ChunkSink, FinishedPack
from imagecache.build.known import KnownChunks
from imagecache.chunks import BLOCK, MAX_CHUNK_BYTES
from imagecache.chunks.cut import squeeze
from imagecache.faces.erofs import write_erofs
from imagecache.faces.ext4 import write_ext4
from imagecache.faces.plan import MetadataRegion
from imagecache.flatten.filetable import FileTable
from imagecache.flatten.limits import Limits
from imagecache.flatten.tree import Tree, merge


@dataclass(frozen=True, slots=True)
class AssembledImage:
    """What assembling made: plaintext objects to seal and store, and what it cost."""

    manifest: bytes
    locations: bytes
    new_chunks: int
    stored_bytes: int


def assemble(
    directory: Path,
    layers: Sequence[tuple[LayerIndex, bytes]],
    known: KnownChunks,
    announce: Callable[[FinishedPack], None],
    *,
    face: Face,
    options: str,
    limits: Limits,
    level: int,
    generation: int,
    threads: int = 0,
    pack_key: PackKey | None = None,
) -> AssembledImage:
    """Assembles the image of `layers`, bottom first, each with its index's digest.

    `known.image` must hold every chunk of the layers. Raises Rejected where the tree breaks a
    limit.
    """
    tables = [FileTable.decode(index.file_table, limits) for index, _ in layers]
    region = write_face(merge(tables), face, options)
    plan = region.plan
    # A metadata region is few chunks, each read by itself: a run of one is long enough.
    sink = ChunkSink(
        directory,
        known,
        announce,
        generation=generation,
        level=level,
        threads=threads,
        least_run_bytes=0,
        pack_key=pack_key,
    )
    laid = []
    for section in region.sections:
        for at in range(0, len(section), MAX_CHUNK_BYTES):
            plaintext, runs = squeeze(section[at : at + MAX_CHUNK_BYTES])
            laid.append((sink.submit(plaintext) if plaintext else -1, runs))
    sink.finish()
    pieces = PieceBuilder()
    for ticket, runs in laid:
        if ticket < 0:
            pieces.zeros(sum(blocks for _, blocks in runs))
        else:
            pieces.chunk(sink.digests[ticket], runs)
    placed = []
    for (index, digest), start in zip(layers, plan.layer_start_blocks, strict=True):
        pieces.zeros(start - pieces.total_blocks)
        pieces.append(index.pieces, index.chunks)
        placed.append(PlacedLayer(digest, start, index.region_blocks))
    pieces.zeros(plan.disk_blocks - pieces.total_blocks)
    chunks, extents = pieces.finish()
    manifest = BlockManifest(
        face=face,
        options=options,
        disk_blocks=plan.disk_blocks,
        metadata_blocks=sum(len(section) for section in region.sections) // BLOCK,
        window_blocks=plan.window_blocks,
        layers=tuple(placed),
        chunks=chunks,
        pieces=extents,
    ).encode()
    locations = LocationTable.build(blake3(manifest).digest(), sink.locations(chunks))
    return AssembledImage(manifest, locations.encode(), sink.new_chunks, sink.stored_bytes)


def write_face(tree: Tree, face: Face, options: str) -> MetadataRegion:
    """The metadata region of a tree in one face; `options` as in the block manifest."""
    if face is Face.EROFS:
        return write_erofs(tree)
    free_bytes = json.loads(options).get("free_bytes", 0)
    return write_ext4(tree, free_blocks=free_bytes // BLOCK)
