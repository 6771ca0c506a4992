"""Records: the encoding of the guest's configuration disk and of control frames.

A record is a run of fields: u16 key, u16 flags, u32 length, value; little-endian. Pure: no I/O.
Format: PROTOCOL.md, "Records". The guest's half is agent/record.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from imagecache.errors import Rejected

FIELD_HEADER: Final = struct.Struct("<HHI")
CRITICAL: Final = 1  # flag: a reader that does not know this key must refuse the record


def field(key: int, value: bytes, *, critical: bool = False) -> bytes:
    """One encoded field."""
    return FIELD_HEADER.pack(key, CRITICAL if critical else 0, len(value)) + value


def text(key: int, value: str, *, critical: bool = False) -> bytes:
    """A text field; surrogates stand for bytes that are not UTF-8."""
    return field(key, value.encode("utf-8", "surrogateescape"), critical=critical)


def number(key: int, value: int, *, critical: bool = False) -> bytes:
    """A number field of eight bytes."""
    return field(key, value.to_bytes(8, "little"), critical=critical)


def fields(record: bytes) -> Iterator[tuple[int, bytes]]:
    """Keys and values of a record from the guest; raises Rejected where it is cut off."""
    at = 0
    while at < len(record):
        if len(record) - at < FIELD_HEADER.size:
            raise Rejected("the guest sent a record with a broken field header")
        key, _flags, length = FIELD_HEADER.unpack_from(record, at)
        at += FIELD_HEADER.size
        if length > len(record) - at:
            raise Rejected("the guest sent a record with a field longer than the record")
        yield key, record[at : at + length]
        at += length


def numbers(record: bytes) -> dict[int, int]:
    """The fields of a record that are 1, 2, 4 or 8 bytes wide, as numbers by key."""
    return {
        key: int.from_bytes(value, "little")
        for key, value in fields(record)
        if len(value) in (1, 2, 4, 8)
    }


def words(record: bytes) -> dict[int, str]:
    """All fields of a record as text by key, with control characters made visible."""
    return {key: printable(value) for key, value in fields(record)}


def printable(raw: bytes) -> str:
    """Guest text that cannot drive the terminal it is shown on."""
    decoded = raw.decode("utf-8", "replace")
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else f"\\x{ord(sign):02x}" for sign in decoded
    )
