"""The location table: where one store keeps the chunks of a layer index or block manifest.

It is in no identity: collection and re-packing may write another one for the same subject.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from imagecache.blockimage.extents import MAX_CHUNKS, packed, unpacked
from imagecache.chunks import MAX_STORED_BYTES
from imagecache.errors import Corrupt, Unsupported

MAGIC = b"CCLOCAT1"
VERSION = 1
HEADER = struct.Struct("<8sHHII32s")  # magic, version, reserved, packs, chunks, subject digest
ROW_BYTES = 4 + 4 + 4 + 1 + 1
MAX_PACKS = 1 << 20
PACK_NAME = struct.Struct("<I32s")  # generation that it was written in, digest of its bytes


def pack_name(digest: bytes, generation: int) -> bytes:
    """A pack's name in location tables (36 bytes)."""
    return PACK_NAME.pack(generation, digest)


def split_pack_name(name: bytes) -> tuple[int, bytes]:
    """The generation and the digest in a pack's name."""
    generation, digest = PACK_NAME.unpack(name)
    return generation, digest


@dataclass(frozen=True, slots=True)
class Location:
    """Where a store keeps one chunk: offset and length in stored bytes of a pack."""

    pack: bytes
    offset: int
    stored_length: int
    codec: int
    key_id: int


@dataclass(frozen=True, slots=True)
class LocationTable:
    """Locations by chunk ordinal of the subject, as parallel arrays."""

    subject: bytes
    packs: tuple[bytes, ...]
    pack_ordinals: array[int]  # I
    offsets: array[int]  # I
    stored_lengths: array[int]  # I
    codecs: bytes
    key_ids: bytes

    def __len__(self) -> int:
        return len(self.offsets)

    def locate(self, ordinal: int) -> Location:
        """The location of one chunk."""
        return Location(
            self.packs[self.pack_ordinals[ordinal]],
            self.offsets[ordinal],
            self.stored_lengths[ordinal],
            self.codecs[ordinal],
            self.key_ids[ordinal],
        )

    @classmethod
    def build(cls, subject: bytes, locations: Iterable[Location]) -> LocationTable:
        """A table of locations in the subject's chunk order; packs stand by first use."""
        packs: dict[bytes, int] = {}
        ordinals, offsets, lengths = array("I"), array("I"), array("I")
        codecs, key_ids = bytearray(), bytearray()
        for place in locations:
            ordinals.append(packs.setdefault(place.pack, len(packs)))
            offsets.append(place.offset)
            lengths.append(place.stored_length)
            codecs.append(place.codec)
            key_ids.append(place.key_id)
        return cls(subject, tuple(packs), ordinals, offsets, lengths, bytes(codecs), bytes(key_ids))

    def encode(self) -> bytes:
        """The bytes of the table; their BLAKE3-256 names the object that holds them."""
        return b"".join(
            (
                HEADER.pack(MAGIC, VERSION, 0, len(self.packs), len(self), self.subject),
                *self.packs,
                packed(self.pack_ordinals, "I"),
                packed(self.offsets, "I"),
                packed(self.stored_lengths, "I"),
                self.codecs,
                self.key_ids,
            )
        )

    @classmethod
    def decode(cls, plaintext: bytes) -> LocationTable:
        """Raises Corrupt for damaged bytes, Unsupported for a newer version."""
        if len(plaintext) < HEADER.size:
            raise Corrupt("a location table is truncated")
        magic, version, reserved, pack_count, count, subject = HEADER.unpack_from(plaintext)
        if magic != MAGIC or reserved:
            raise Corrupt("not a location table")
        if version > VERSION:
            raise Unsupported(
                f"a location table of version {version}", remedy="needs a newer cubecache"
            )
        end = HEADER.size + pack_count * PACK_NAME.size + count * ROW_BYTES
        if pack_count > MAX_PACKS or count > MAX_CHUNKS or len(plaintext) != end:
            raise Corrupt("a location table has a wrong length for its counts")
        view = memoryview(plaintext)
        at = HEADER.size
        packs = tuple(
            bytes(view[at + n * PACK_NAME.size : at + (n + 1) * PACK_NAME.size])
            for n in range(pack_count)
        )
        at += pack_count * PACK_NAME.size
        table = cls(
            subject=subject,
            packs=packs,
            pack_ordinals=unpacked(view[at : at + 4 * count], "I"),
            offsets=unpacked(view[at + 4 * count : at + 8 * count], "I"),
            stored_lengths=unpacked(view[at + 8 * count : at + 12 * count], "I"),
            codecs=bytes(view[at + 12 * count : at + 13 * count]),
            key_ids=bytes(view[at + 13 * count :]),
        )
        if count and (
            max(table.pack_ordinals) >= pack_count
            or not 0 < min(table.stored_lengths) <= max(table.stored_lengths) <= MAX_STORED_BYTES
        ):
            raise Corrupt("a location table names a pack or length outside the format")
        return table
