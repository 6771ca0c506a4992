"""How a store holds one chunk: raw or zstd, each alone, so that any chunk can be read by itself."""

from __future__ import annotations

from enum import IntEnum

import zstandard

from imagecache.chunks import BLOCK, MAX_CHUNK_BYTES
from imagecache.errors import Corrupt

DEFAULT_LEVEL = 1
# What level 1 means here: zstd's fast strategy with a table that stays in the second cache and
# matches from 5 bytes on. Measured on 350 MB of a JRE image in chunks of 256 KiB: 1.05 s and
# 121.1 MB, zstd's own level 1 0.93 s and 124.3 MB, level 3 1.46 s and 117.0 MB.
_FAST = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=18, hash_log=15, min_match=5, target_length=0
)
# What compression shrinks by less than 5 % is stored raw (design 3.3).
WORTH_NUMERATOR, WORTH_DENOMINATOR = 95, 100


class Codec(IntEnum):
    """The encodings that a location may name; the numbers are part of the format."""

    RAW = 0
    ZSTD = 1


class ChunkEncoder:
    """Encodes chunks with one reusable zstd context; use one instance per thread."""

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        if level == DEFAULT_LEVEL:
            self._zstd = zstandard.ZstdCompressor(compression_params=_FAST)
        else:
            self._zstd = zstandard.ZstdCompressor(level=level)

    def encode(self, plaintext: bytes | memoryview) -> tuple[Codec, bytes]:
        """The codec chosen for a chunk and its stored bytes."""
        packed = self._zstd.compress(plaintext)
        if len(packed) * WORTH_DENOMINATOR > len(plaintext) * WORTH_NUMERATOR:
            return Codec.RAW, bytes(plaintext)
        return Codec.ZSTD, packed


def decode_chunk(codec: int, stored: bytes | memoryview, length: int) -> bytes:
    """The plaintext of `length` bytes behind stored bytes.

    Raises Corrupt for an unknown codec, a wrong length or a frame zstd refuses. The output is
    capped at `length` before anything is allocated, whatever the frame claims.
    """
    if not 0 < length <= MAX_CHUNK_BYTES or length % BLOCK:
        raise Corrupt(f"a chunk of {length} bytes is outside the format")
    if codec == Codec.RAW:
        plaintext = bytes(stored)
    elif codec == Codec.ZSTD:
        plaintext = _unzstd(stored, length)
    else:
        raise Corrupt(
            f"chunk codec {codec} is unknown", remedy="a newer cubecache wrote it: upgrade"
        )
    if len(plaintext) != length:
        raise Corrupt(f"a chunk decoded to {len(plaintext)} bytes instead of {length}")
    return plaintext


def _unzstd(stored: bytes | memoryview, length: int) -> bytes:
    try:
        if zstandard.frame_content_size(stored) != length:
            raise Corrupt("a chunk's zstd frame names another content size")
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=length)
    except zstandard.ZstdError as error:
        raise Corrupt(f"a chunk's zstd frame is damaged: {error}") from error
