"""Packs: what the writer emits, the table reads back; damage is found."""

import pytest
from blake3 import blake3

from imagecache.errors import Corrupt
from imagecache.packs.pack import TABLE_ENTRY, TRAILER, PackWriter, read_table, read_trailer

pytestmark = pytest.mark.quick


def packed() -> tuple[bytes, bytes]:
    writer = PackWriter()
    parts = [writer.start()]
    for n in range(5):
        parts.append(
            writer.add(blake3(bytes([n])).digest(), bytes([n]) * (n + 1), blocks=1, codec=0)
        )
    tail, name = writer.finish()
    return b"".join([*parts, tail]), name


def table_of(raw: bytes) -> bytes:
    entries = read_trailer(raw[-TRAILER.size :], len(raw)).entries
    end = len(raw) - TRAILER.size
    return raw[end - entries * TABLE_ENTRY.size : end]


def test_table_reads_back_and_name_is_the_digest() -> None:
    raw, name = packed()
    assert blake3(raw).digest() == name
    rows = read_table(table_of(raw), len(raw))
    assert [raw[row.offset : row.offset + row.stored_length] for row in rows] == [
        bytes([n]) * (n + 1) for n in range(5)
    ]


def test_damaged_tables_are_corrupt() -> None:
    """D1: a wrong magic, a row outside the pack or a torn table is refused."""
    raw, _ = packed()
    with pytest.raises(Corrupt):
        read_trailer(raw[-TRAILER.size : -1] + b"?", len(raw))
    with pytest.raises(Corrupt):
        read_trailer(b"", 0)
    with pytest.raises(Corrupt):
        read_trailer(raw[-TRAILER.size :], 100)
    table = table_of(raw)
    with pytest.raises(Corrupt):
        read_table(table[:-1], len(raw))
    for at in (32, 36, 40):
        torn = bytearray(table)
        torn[at : at + 2] = b"\xff\xff"
        torn[at + 2 if at < 40 else at] = 0xFF
        with pytest.raises(Corrupt):
            read_table(bytes(torn), len(raw))
