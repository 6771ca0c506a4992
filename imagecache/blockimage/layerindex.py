"""The layer index: one layer's file table and data region, named by its own digest."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imagecache.blockimage.extents import (
    ChunkList,
    ExtentMap,
    Pieces,
    columns_length,
    decode_chunks_and_pieces,
    encode_chunks_and_pieces,
)
from imagecache.errors import Corrupt, Unsupported

MAGIC = b"CCLAYER1"
VERSION = 1
# magic, version, cut rule version, diff id length, reserved, chunks, pieces, file table bytes
HEADER = struct.Struct("<8sHHHHIIQ")
MAX_FILE_TABLE = 512 << 20


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """What a layer means: its diff id, its encoded file table, and its region's chunks in order."""

    diff_id: str
    file_table: bytes
    chunks: ChunkList
    pieces: Pieces

    @property
    def region_blocks(self) -> int:
        """Blocks of the layer's data region."""
        return self.pieces.total_blocks

    def encode(self) -> bytes:
        """The canonical bytes; their BLAKE3-256 is the layer index's name."""
        diff_id = self.diff_id.encode()
        header = HEADER.pack(
            MAGIC,
            VERSION,
            1,
            len(diff_id),
            0,
            len(self.chunks),
            len(self.pieces.blocks),
            len(self.file_table),
        )
        columns = encode_chunks_and_pieces(self.chunks, self.pieces)
        return header + diff_id + columns + self.file_table

    @classmethod
    def decode(cls, plaintext: bytes) -> LayerIndex:
        """Raises Corrupt for damaged bytes, Unsupported for a newer version."""
        if len(plaintext) < HEADER.size:
            raise Corrupt("a layer index is truncated")
        fields = HEADER.unpack_from(plaintext)
        magic, version, rule, diff_length, reserved, chunk_count, piece_count, table_bytes = fields
        if magic != MAGIC or reserved:
            raise Corrupt("not a layer index")
        if version > VERSION or rule > 1:
            raise Unsupported(
                f"a layer index of version {version}.{rule}", remedy="needs a newer cubecache"
            )
        columns_at = HEADER.size + diff_length
        table_at = columns_at + columns_length(chunk_count, piece_count)
        if table_bytes > MAX_FILE_TABLE or len(plaintext) != table_at + table_bytes:
            raise Corrupt("a layer index has a wrong length for its counts")
        view = memoryview(plaintext)
        chunks, pieces = decode_chunks_and_pieces(
            view[columns_at:table_at], chunk_count, piece_count
        )
        ExtentMap(pieces, chunks)  # proves that pieces and chunks agree
        try:
            diff_id = bytes(view[HEADER.size : columns_at]).decode("ascii")
        except UnicodeDecodeError as error:
            raise Corrupt("a layer index has a damaged diff id") from error
        return cls(diff_id, bytes(view[table_at:]), chunks, pieces)
