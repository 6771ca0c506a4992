"""The boot table: which chunks a boot pack holds, in the order in which they stream. Pure.

The pack is an ordinary pack (`imagecache.packs`) under a key of its own kind. Its table is stored
apart, because a stream is verified chunk by chunk as it arrives, and a pack's own table is last.
Chunks are named by digest, so the boot pack of one version serves the next as far as they agree.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imagecache.chunks import DIGEST_BYTES, MAX_CHUNK_BLOCKS, MAX_STORED_BYTES
from imagecache.errors import Corrupt, Unsupported
from imagecache.packs.pack import HEADER as PACK_HEADER
from imagecache.packs.pack import TABLE_ENTRY, PackedChunk

MAGIC = b"CCBOOTT1"
VERSION = 1
# magic, version, reserved, entries, pack length, block image, profile, pack name
HEADER = struct.Struct("<8sHHIQ32s32s32s")
MAX_ENTRIES = 1 << 16
MAX_BOOT_BYTES = 512 << 20
"""Stored bytes of one boot pack; what a profile names beyond it is left to the fill."""
MAX_ENCODED = HEADER.size + MAX_ENTRIES * TABLE_ENTRY.size


@dataclass(frozen=True, slots=True)
class BootTable:
    """One boot pack: made for `block_image` from `profile`; `pack` is its name, as its key says."""

    block_image: bytes
    profile: bytes
    pack: bytes
    pack_length: int
    entries: tuple[PackedChunk, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the chunks in the pack: what a stream of them all brings."""
        return sum(entry.stored_length for entry in self.entries)

    def encode(self) -> bytes:
        """The table's bytes; their BLAKE3-256 names the object that holds them."""
        header = HEADER.pack(
            MAGIC,
            VERSION,
            0,
            len(self.entries),
            self.pack_length,
            self.block_image,
            self.profile,
            self.pack,
        )
        rows = (
            TABLE_ENTRY.pack(x.digest, x.offset, x.stored_length, x.blocks, x.codec, x.key_id)
            for x in self.entries
        )
        return header + b"".join(rows)

    @classmethod
    def decode(cls, plaintext: bytes) -> BootTable:
        """Raises Corrupt for damaged bytes, Unsupported for a newer version."""
        if len(plaintext) < HEADER.size:
            raise Corrupt("a boot table is truncated")
        magic, version, reserved, count, length, block_image, profile, pack = HEADER.unpack_from(
            plaintext
        )
        if magic != MAGIC or reserved:
            raise Corrupt("not a boot table")
        if version > VERSION:
            raise Unsupported(
                f"a boot table of version {version}", remedy="needs a newer cubecache"
            )
        if count > MAX_ENTRIES or len(plaintext) != HEADER.size + count * TABLE_ENTRY.size:
            raise Corrupt("a boot table has a wrong length for its count")
        rows = TABLE_ENTRY.iter_unpack(memoryview(plaintext)[HEADER.size :])
        entries = tuple(PackedChunk(*row) for row in rows)
        at = len(PACK_HEADER)
        for entry in entries:
            if entry.offset != at or not 0 < entry.stored_length <= MAX_STORED_BYTES:
                raise Corrupt("a boot table's chunks do not follow each other")
            if not 0 < entry.blocks <= MAX_CHUNK_BLOCKS or len(entry.digest) != DIGEST_BYTES:
                raise Corrupt("a boot table names a chunk outside the format")
            at += entry.stored_length
        if at > min(length, MAX_BOOT_BYTES + MAX_STORED_BYTES):
            raise Corrupt("a boot table names more bytes than its pack has, or over the cap")
        return cls(block_image, profile, pack, length, entries)
