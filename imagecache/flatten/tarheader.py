"""One 512-byte tar header: checksum, numbers, names; V7, ustar, GNU and star forms.

Format: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format". Field
offsets: name 0, mode 100, uid 108, gid 116, size 124, mtime 136, checksum 148, type 156, link name
157, magic 257, version 263, user 265, group 297, major 329, minor 337, prefix 345.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import NamedTuple

from imagecache.errors import Rejected

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)

_FIELDS = struct.Struct("100s8s8s8s12s12s8s1s100s8s64x8s8s155s12x")
_OCTAL = re.compile(rb"[ \0]*([0-7]*)(?:[ \0].*)?", re.DOTALL)


class RawHeader(NamedTuple):
    """The fields of one header block as they stand; numbers parsed, names cut at their NUL."""

    typeflag: bytes
    name: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    major: int
    minor: int
    is_gnu: bool


def parse_number(field: bytes, what: str, where: str) -> int:
    """An octal field, or a base-256 one (first bit set), which alone may be negative."""
    first = field[0]
    if first & 0x80:
        if first == 0xFF:
            return int.from_bytes(field, "big", signed=True)
        if first == 0x80:
            return int.from_bytes(field[1:], "big")
        return int.from_bytes(bytes([first & 0x7F]) + field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise Rejected(f"{where}: the header's {what} is no number")
    return int(match[1] or b"0", 8)


def checksum_holds(block: bytes) -> bool:
    """Whether the stored checksum is the sum of bytes, or of signed bytes as old Suns wrote."""
    match = _OCTAL.fullmatch(block, 148, 156)
    if match is None or not match[1]:
        return False
    stored = int(match[1], 8)
    if block.isascii():
        # Adler-32's low half is 1 + the sum, exact while the sum is below 65521.
        total = (zlib.adler32(block) & 0xFFFF) - 1
    else:
        total = sum(block)
    field = block[148:156]
    total += 256 - sum(field)
    if total == stored:
        return True
    high = sum(byte > 127 for byte in block) - sum(byte > 127 for byte in field)
    return total - 256 * high == stored


def is_header(block: bytes) -> bool:
    """Whether these bytes look like the start of a member or of the archive's end."""
    return len(block) < BLOCK or block == ZERO_BLOCK or checksum_holds(block)


class HeaderParser:
    """Parses header blocks; remembers the numbers it has seen, since owners and modes repeat."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}

    def parse(self, block: bytes, where: str) -> RawHeader:
        """The fields of a block. Raises `Rejected` for a bad checksum or number."""
        if not checksum_holds(block):
            raise Rejected(
                f"{where} is no tar header: its checksum is wrong",
                remedy="the layer is no tar archive, or it is damaged",
            )
        (name, mode, uid, gid, size, mtime, _, typeflag, link, magic, major, minor, prefix) = (
            _FIELDS.unpack(block)
        )
        name = name.partition(b"\0")[0]
        is_gnu = magic == b"ustar  \0"
        if magic[:6] == b"ustar\0":
            if block[508:512] == b"tar\0":
                prefix = prefix[:131]  # star keeps two times behind a shorter prefix
            if prefix[0]:
                name = prefix.partition(b"\0")[0] + b"/" + name
        if not size[0] & 0x80 and size.isspace():
            raise Rejected(f"{where}: the header's size is blank")
        numbers = self._numbers
        try:
            values = numbers[mode], numbers[uid], numbers[gid], numbers[mtime]
        except KeyError:
            values = (
                self._number(mode, "mode", where),
                self._number(uid, "uid", where),
                self._number(gid, "gid", where),
                self._number(mtime, "mtime", where),
            )
        if typeflag in b"34" and typeflag:
            devices = (
                self._number(major, "device major", where),
                self._number(minor, "device minor", where),
            )
        else:
            devices = (0, 0)
        return RawHeader(
            typeflag,
            name,
            link.partition(b"\0")[0],
            *values[:3],
            parse_number(size, "size", where),
            values[3],
            *devices,
            is_gnu,
        )

    def _number(self, field: bytes, what: str, where: str) -> int:
        value = self._numbers.get(field)
        if value is None:
            value = parse_number(field, what, where)
            if len(self._numbers) > 10_000:
                self._numbers.clear()
            self._numbers[field] = value
        return value
