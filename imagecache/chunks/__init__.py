"""Chunks: runs of whole blocks, addressed by the BLAKE3-256 of their plaintext. Pure, no I/O.

A chunk holds no all-zero block (zeros are extents). Cutting and encoding are functions of their
input alone; which codec a store holds a chunk in is part of its location, never of its identity.
"""

from blake3 import blake3

BLOCK = 4096
"""Bytes in a block, the addressing unit of every disk, region and chunk."""

MAX_CHUNK_BLOCKS = 64
"""Blocks in the largest chunk (256 KiB); the arena's slots and every decoder's cap rest on it."""

MAX_CHUNK_BYTES = MAX_CHUNK_BLOCKS * BLOCK
SEAL_BYTES = 28
"""What sealing adds to a stored chunk: a nonce of 12 and a tag of 16 bytes."""

MAX_STORED_BYTES = MAX_CHUNK_BYTES + SEAL_BYTES
DIGEST_BYTES = 32
ZERO_BLOCK = bytes(BLOCK)


def chunk_digest(plaintext: bytes | bytearray | memoryview) -> bytes:
    """The 32-byte BLAKE3-256 address of a chunk's plaintext."""
    return blake3(plaintext).digest()
