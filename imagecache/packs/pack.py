"""Writing a pack piece by piece, and reading its table back."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from blake3 import blake3

from imagecache.blockimage.seals import MAX_KEY_ID, NO_KEY, NO_SEALS, PackKey, Seals
from imagecache.chunks import DIGEST_BYTES, MAX_CHUNK_BLOCKS, MAX_STORED_BYTES, SEAL_BYTES
from imagecache.errors import Corrupt

MAGIC = b"CCPACK01"
TRAILER_MAGIC = b"CCPACKT1"
HEADER = MAGIC
TABLE_ENTRY = struct.Struct("<32sIIHBB")  # digest, offset, stored length, blocks, codec, key id
TRAILER = struct.Struct("<II8s")  # entries, key id of the table, magic
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

    def __init__(self, pack_key: PackKey | None = None) -> None:
        """`pack_key` seals the table; chunks come sealed or in the clear, as `key_id` says."""
        self._pack_key = pack_key
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

    def add(
        self, digest: bytes, stored: bytes, *, blocks: int, codec: int, key_id: int = NO_KEY
    ) -> bytes:
        """Appends one encoded chunk."""
        self._entries.append(PackedChunk(digest, self._length, len(stored), blocks, codec, key_id))
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
        key_id = NO_KEY
        if self._pack_key is not None:
            key_id, table = self._pack_key.key_id, self._pack_key.seal_table(table)
        tail = self._emit(table + TRAILER.pack(len(self._entries), key_id, TRAILER_MAGIC))
        return tail, self._hasher.digest()

    def _emit(self, piece: bytes) -> bytes:
        self._hasher.update(piece)
        self._length += len(piece)
        return piece


@dataclass(frozen=True, slots=True)
class PackTrailer:
    """The end of a pack: how many rows its table has, and the key id that the table is under."""

    entries: int
    key_id: int

    @property
    def table_bytes(self) -> int:
        """Stored bytes of the table, which stand right before the trailer."""
        return self.entries * TABLE_ENTRY.size + (SEAL_BYTES if self.key_id != NO_KEY else 0)


def read_trailer(trailer: bytes, pack_length: int) -> PackTrailer:
    """What a pack's last `TRAILER.size` bytes announce; Corrupt."""
    if len(trailer) != TRAILER.size:
        raise Corrupt("a pack is shorter than its trailer")
    entries, key_id, magic = TRAILER.unpack(trailer)
    if magic != TRAILER_MAGIC or key_id > MAX_KEY_ID or entries > MAX_ENTRIES:
        raise Corrupt("a pack's trailer is damaged")
    found = PackTrailer(entries, key_id)
    if len(HEADER) + found.table_bytes + TRAILER.size > pack_length:
        raise Corrupt("a pack's table is longer than the pack")
    return found


def read_table(
    table: bytes, pack_length: int, key_id: int = NO_KEY, seals: Seals = NO_SEALS
) -> tuple[PackedChunk, ...]:
    """The rows of a pack's stored table.

    Raises Corrupt for a row that leaves the data, or a broken seal; Denied without its secret.
    """
    data_end = pack_length - len(table) - TRAILER.size
    table = seals.open_table(key_id, table)
    if len(table) % TABLE_ENTRY.size:
        raise Corrupt("a pack's table has a torn row")
    rows = tuple(PackedChunk(*row) for row in TABLE_ENTRY.iter_unpack(table))
    for row in rows:
        inside = len(HEADER) <= row.offset and row.offset + row.stored_length <= data_end
        if not inside or not 0 < row.blocks <= MAX_CHUNK_BLOCKS:
            raise Corrupt("a pack's table names bytes outside the pack")
        if not 0 < row.stored_length <= MAX_STORED_BYTES or len(row.digest) != DIGEST_BYTES:
            raise Corrupt("a pack's table names a chunk outside the format")
    return rows
