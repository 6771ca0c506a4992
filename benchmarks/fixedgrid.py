"""The layout that ours is compared with: a data region cut on one fixed grid."""

from __future__ import annotations

from blake3 import blake3
from cutting import Convert, CutLayer, LayerBlob, Workplace, convert_by, sealed_bytes, write_pieces

from imagecache.blockimage.extents import PieceBuilder
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import LocationTable
from imagecache.build.chunksink import ChunkSink
from imagecache.build.known import KnownChunks
from imagecache.chunks import BLOCK
from imagecache.chunks.codec import DEFAULT_LEVEL
from imagecache.chunks.cut import squeeze


def convert_by_grid(blocks: int) -> Convert:
    """Conversion by a grid of `blocks`: the region is made by our rule first, and cut anew."""
    by_rule = convert_by()

    def convert(layer: LayerBlob, known: KnownChunks, place: Workplace) -> CutLayer:
        first = Workplace(place.directory(), keep=True)
        made = by_rule(layer, KnownChunks(), first)
        index = made.decoded
        region = place.directory() / "region"
        write_pieces(
            index.chunks,
            index.pieces,
            lambda n: first.read(made.table.locate(n), index.chunks.sizes[n]),
            region,
        )
        before = place.packed_bytes
        sink = ChunkSink(place.directory(), known, place.announce, level=DEFAULT_LEVEL)
        laid = []
        with region.open("rb") as source:
            for body in iter(lambda: source.read(blocks * BLOCK), b""):
                plaintext, runs = squeeze(body)
                laid.append((sink.submit(plaintext) if plaintext else -1, runs))
        sink.finish()
        pieces = PieceBuilder()
        for ticket, runs in laid:
            if ticket < 0:
                pieces.zeros(sum(count for _, count in runs))
            else:
                pieces.chunk(sink.digests[ticket], runs)
        for path in (*first.packs.values(), region):
            path.unlink()
        chunks, region_pieces = pieces.finish()
        plaintext = LayerIndex(layer.diff_id, index.file_table, chunks, region_pieces).encode()
        table = LocationTable.build(blake3(plaintext).digest(), sink.locations(chunks))
        stored = place.packed_bytes - before + sealed_bytes(plaintext, table.encode())
        return CutLayer(plaintext, table, sink.new_chunks, stored)

    return convert
