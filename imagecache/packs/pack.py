"""Writing a pack piece by piece, and reading its table back."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from blake3 import blake3

from imagecache.chunks import DIGEST_BYTES, MAX_CHUNK_BLOCKS, MAX_CHUNK_BYTES
from imagecache.errors import Corrupt

MAGIC = b"CCPACK01"
TRAILER_MAGIC = b"CCPACKT1"
HEADER = MAGIC
TABLE_ENTRY = struct.Struct("<32sIIHBB")  # digest, offset, stored length, blocks, codec, key id
TRAILER = struct.Struct("<II8s")  # entries, reserved (0), magic
TARGET_BYTES = 32 << 20
MAX_BYTES = 256 << 20
MAX_ENTRIES = 1 << 18


@dataclass(frozen=True, slots=True)
class PackedChunk:
    """One row of a pack's table: offsets and lengths in stored bytes from the pack's start."""

    digest: bytes
    offset: int
    stored_length: int
    blocks: int
    codec: int
    key_id: int


class PackWriter:
    """Builds one pack: every call returns the bytes to append to the object, in order."""

    def __init__(self) -> None:
        self._entries: list[PackedChunk] = []
        self._length = 0
        self._hasher = blake3()

    @property
    def length(self) -> int:
        """Bytes emitted so far."""
        return self._length

    @property
    def entries(self) -> tuple[PackedChunk, ...]:
        """The chunks added so far, in order."""
        return tuple(self._entries)

    def start(self) -> bytes:
        """The pack's header."""
        return self._emit(HEADER)

    def add(self, digest: bytes, stored: bytes, *, blocks: int, codec: int) -> bytes:
        """Appends one encoded chunk."""
        self._entries.append(PackedChunk(digest, self._length, len(stored), blocks, codec, 0))
        return self._emit(stored)

    def is_full(self) -> bool:
        """Whether the pack has reached its target size and should be finished."""
        return self._length >= TARGET_BYTES or len(self._entries) >= MAX_ENTRIES

    def finish(self) -> tuple[bytes, bytes]:
        """The table and trailer, and the finished pack's name (32 bytes)."""
        table = b"".join(
            TABLE_ENTRY.pack(e.digest, e.offset, e.stored_length, e.blocks, e.codec, e.key_id)
            for e in self._entries
        )
        tail = self._emit(table + TRAILER.pack(len(self._entries), 0, TRAILER_MAGIC))
        return tail, self._hasher.digest()

    def _emit(self, piece: bytes) -> bytes:
        self._hasher.update(piece)
        self._length += len(piece)
        return piece


def read_trailer(trailer: bytes, pack_length: int) -> int:
    """The number of table entries that a pack's last `TRAILER.size` bytes announce."""
    if len(trailer) != TRAILER.size:
        raise Corrupt("a pack is shorter than its trailer")
    entries, reserved, magic = TRAILER.unpack(trailer)
    table_bytes = entries * TABLE_ENTRY.size
    if magic != TRAILER_MAGIC or reserved or entries > MAX_ENTRIES:
        raise Corrupt("a pack's trailer is damaged")
    if len(HEADER) + table_bytes + TRAILER.size > pack_length:
        raise Corrupt("a pack's table is longer than the pack")
    return int(entries)


def read_table(table: bytes, pack_length: int) -> tuple[PackedChunk, ...]:
    """The rows of a pack's table; raises Corrupt for a row that leaves the pack's data."""
    if len(table) % TABLE_ENTRY.size:
        raise Corrupt("a pack's table has a torn row")
    data_end = pack_length - len(table) - TRAILER.size
    rows = tuple(PackedChunk(*row) for row in TABLE_ENTRY.iter_unpack(table))
    for row in rows:
        inside = len(HEADER) <= row.offset and row.offset + row.stored_length <= data_end
        if not inside or not 0 < row.blocks <= MAX_CHUNK_BLOCKS:
            raise Corrupt("a pack's table names bytes outside the pack")
        if not 0 < row.stored_length <= MAX_CHUNK_BYTES or len(row.digest) != DIGEST_BYTES:
            raise Corrupt("a pack's table names a chunk outside the format")
    return rows
