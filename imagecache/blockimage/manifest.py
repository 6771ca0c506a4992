"""The block manifest: one virtual disk, named by the digest of what it means."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from imagecache.blockimage.extents import (
    ChunkList,
    ExtentMap,
    Pieces,
    columns_length,
    decode_chunks_and_pieces,
    encode_chunks_and_pieces,
)
from imagecache.chunks import BLOCK, DIGEST_BYTES
from imagecache.errors import Corrupt, Unsupported

MAGIC = b"CCBLOCK1"
VERSION = 1
# magic, version, face, reserved, disk blocks, metadata blocks, window blocks, layers, chunks,
# pieces, options bytes
HEADER = struct.Struct("<8sHBBQIIIIII")
LAYER = struct.Struct("<32sQQ")  # layer index digest, start block, blocks
MAX_LAYERS = 4096
MAX_OPTIONS = 4096


class Face(IntEnum):
    """The file system of a metadata region; the numbers are part of the format."""

    EROFS = 1
    EXT4 = 2

    @classmethod
    def parse(cls, name: str) -> Face:
        """The face of that name (`erofs`, `ext4`)."""
        return cls[name.upper()]


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """A layer's data region on the disk."""

    index: bytes  # layer index digest
    start_block: int
    blocks: int


@dataclass(frozen=True)
class BlockManifest:
    """Face, options, layers and every extent of one block image; sizes in blocks."""

    face: Face
    options: str  # canonical JSON
    disk_blocks: int
    metadata_blocks: int
    window_blocks: int
    layers: tuple[PlacedLayer, ...]
    chunks: ChunkList
    pieces: Pieces

    @property
    def size_bytes(self) -> int:
        """The virtual disk's size."""
        return self.disk_blocks * BLOCK

    @cached_property
    def extents(self) -> ExtentMap:
        """The disk's extents; raises Corrupt where pieces and chunks disagree."""
        return ExtentMap(self.pieces, self.chunks)

    def encode(self) -> bytes:
        """The canonical bytes; their BLAKE3-256 is the block image's digest."""
        options = self.options.encode()
        header = HEADER.pack(
            MAGIC,
            VERSION,
            self.face,
            0,
            self.disk_blocks,
            self.metadata_blocks,
            self.window_blocks,
            len(self.layers),
            len(self.chunks),
            len(self.pieces.blocks),
            len(options),
        )
        layers = b"".join(LAYER.pack(x.index, x.start_block, x.blocks) for x in self.layers)
        return header + options + layers + encode_chunks_and_pieces(self.chunks, self.pieces)

    @classmethod
    def decode(cls, plaintext: bytes) -> BlockManifest:
        """Raises Corrupt for damaged bytes (D1, D2), Unsupported for a newer version (D4)."""
        if len(plaintext) < HEADER.size:
            raise Corrupt("a block manifest is truncated")
        magic, version, face, reserved, disk, metadata, window, *counts = HEADER.unpack_from(
            plaintext
        )
        layer_count, chunk_count, piece_count, options_length = counts
        if magic != MAGIC or reserved:
            raise Corrupt("not a block manifest")
        if version > VERSION or face not in tuple(Face):
            raise Unsupported(
                f"a block manifest of version {version}, face {face}",
                remedy="needs a newer cubecache",
            )
        if layer_count > MAX_LAYERS or options_length > MAX_OPTIONS:
            raise Corrupt("a block manifest has counts over the format's caps")
        layers_at = HEADER.size + options_length
        columns_at = layers_at + layer_count * LAYER.size
        end = columns_at + columns_length(chunk_count, piece_count)
        if len(plaintext) != end:
            raise Corrupt("a block manifest has a wrong length for its counts")
        view = memoryview(plaintext)
        chunks, pieces = decode_chunks_and_pieces(view[columns_at:end], chunk_count, piece_count)
        manifest = cls(
            face=Face(face),
            options=_options(bytes(view[HEADER.size : layers_at])),
            disk_blocks=disk,
            metadata_blocks=metadata,
            window_blocks=window,
            layers=tuple(
                PlacedLayer(*row) for row in LAYER.iter_unpack(view[layers_at:columns_at])
            ),
            chunks=chunks,
            pieces=pieces,
        )
        if manifest.extents.disk_blocks != disk or not metadata <= window <= disk:
            raise Corrupt("a block manifest's extents do not add up to its size")
        _check_layers(manifest)
        return manifest


def _check_layers(manifest: BlockManifest) -> None:
    at = manifest.window_blocks
    for layer in manifest.layers:
        if layer.start_block < at or len(layer.index) != DIGEST_BYTES:
            raise Corrupt("a block manifest's layers overlap")
        at = layer.start_block + layer.blocks
    if at > manifest.disk_blocks:
        raise Corrupt("a block manifest's layers run past the disk")


def canonical_options(options: dict[str, int | str | bool]) -> str:
    """Options as the one JSON text that enters identities."""
    return json.dumps(options, sort_keys=True, separators=(",", ":"))


def _options(raw: bytes) -> str:
    try:
        text = raw.decode()
        if not isinstance(json.loads(text), dict):
            raise Corrupt("a block manifest's options are not an object")
    except ValueError as error:
        raise Corrupt("a block manifest's options are not JSON") from error
    return text
