"""The envelope of small stored objects: a zstd frame behind a header, checked by plaintext digest.

The codec is outside the digest, so compression can change without renaming anything.
"""

from __future__ import annotations

import struct

import zstandard
from blake3 import blake3

from imagecache.errors import Corrupt, LimitExceeded

MAGIC = b"CCSEAL01"
HEADER = struct.Struct("<8sBBHIQ")  # magic, codec, key id, reserved, reserved, plaintext length
CODEC_RAW, CODEC_ZSTD = 0, 1
MAX_PLAINTEXT = 1 << 30


def seal(plaintext: bytes) -> tuple[bytes, bytes]:
    """The 32-byte name of an object and the bytes to store under it."""
    packed = zstandard.ZstdCompressor(level=9).compress(plaintext)
    codec, payload = CODEC_ZSTD, packed
    if len(packed) >= len(plaintext):
        codec, payload = CODEC_RAW, plaintext
    header = HEADER.pack(MAGIC, codec, 0, 0, 0, len(plaintext))
    return blake3(plaintext).digest(), header + payload


def unseal(stored: bytes, name: bytes, *, limit: int = MAX_PLAINTEXT) -> bytes:
    """The plaintext whose digest is `name`.

    Raises Corrupt for damaged bytes or those of another name, LimitExceeded above `limit`.
    """
    if len(stored) < HEADER.size:
        raise Corrupt(f"object {name.hex()} is truncated")
    magic, codec, key_id, pad_a, pad_b, length = HEADER.unpack_from(stored)
    if magic != MAGIC or pad_a or pad_b:
        raise Corrupt(f"object {name.hex()} is not a cubecache object, or of a newer version")
    if key_id:
        raise Corrupt(f"object {name.hex()} is sealed with key {key_id}, which is not configured")
    if length > MAX_PLAINTEXT:
        raise Corrupt(f"object {name.hex()} claims {length} bytes, over the format's cap")
    if length > limit:
        raise LimitExceeded(f"object {name.hex()} claims {length} bytes; the limit is {limit}")
    payload = memoryview(stored)[HEADER.size :]
    if codec == CODEC_RAW:
        plaintext = bytes(payload)
    elif codec == CODEC_ZSTD:
        try:
            if zstandard.frame_content_size(payload) != length:
                raise Corrupt(f"object {name.hex()} names two lengths")
            plaintext = zstandard.ZstdDecompressor().decompress(payload, max_output_size=length)
        except zstandard.ZstdError as error:
            raise Corrupt(f"object {name.hex()} is damaged: {error}") from error
    else:
        raise Corrupt(f"object {name.hex()} has unknown codec {codec}")
    if len(plaintext) != length or blake3(plaintext).digest() != name:
        raise Corrupt(f"object {name.hex()} does not match its digest")
    return plaintext
