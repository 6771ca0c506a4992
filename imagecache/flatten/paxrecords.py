"""Records of pax extended headers: `LENGTH KEY=VALUE\\n`, and numbers inside them.

Format: POSIX.1-2017 pax, "pax Extended Header"; GNU tar manual, "Sparse Formats".
"""

from __future__ import annotations

import re

from imagecache.errors import Rejected
from imagecache.flatten.kinds import shown

_RECORD_LENGTH = re.compile(rb"([0-9]{1,7}) ")
_DECIMAL = re.compile(rb"[0-9]{1,30}")
_TIME = re.compile(rb"(-?)([0-9]{1,30})(?:\.([0-9]*))?")
XATTR_PREFIX = b"SCHILY.xattr."

MIN_TIME = -(1 << 63)
MAX_TIME = (1 << 63) - 1


def parse_records(body: bytes, where: str) -> list[tuple[bytes, bytes]]:
    """All (key, value) records in order. Raises `Rejected` for any record that lies."""
    records: list[tuple[bytes, bytes]] = []
    at = 0
    end = len(body)
    while at < end:
        match = _RECORD_LENGTH.match(body, at)
        stop = at + int(match[1]) if match else 0
        # A record is at least "5 k=\n" long, ends inside the body, and ends with a newline.
        if match is None or stop > end or stop < match.end() + 3 or body[stop - 1] != 0x0A:
            if not body[at:].strip(b"\0"):
                break  # some writers pad the declared size with NULs
            raise Rejected(f"{where}: pax record at byte {at} of the header is malformed")
        key, equals, value = body[match.end() : stop - 1].partition(b"=")
        if not equals or not key:
            raise Rejected(f"{where}: pax record at byte {at} of the header has no key")
        records.append((key, value))
        at = stop
    return records


def parse_decimal(value: bytes, key: str, where: str) -> int:
    """A non-negative decimal number; raises `Rejected` for anything else."""
    if not _DECIMAL.fullmatch(value):
        raise Rejected(f"{where}: pax {key}={shown(value)} is no decimal number")
    return int(value)


def clamp_time(seconds: int, nanoseconds: int) -> tuple[int, int]:
    """The nearest time that 64 bits of seconds hold."""
    if seconds < MIN_TIME:
        return MIN_TIME, 0
    if seconds > MAX_TIME:
        return MAX_TIME, 999_999_999
    return seconds, nanoseconds


def parse_time(value: bytes, where: str) -> tuple[int, int]:
    """(seconds, nanoseconds) of a decimal time, rounded down to whole nanoseconds."""
    match = _TIME.fullmatch(value)
    if match is None:
        raise Rejected(f"{where}: pax mtime={shown(value)} is no time")
    seconds = int(match[2])
    digits = match[3] or b""
    nanoseconds = int(digits[:9].ljust(9, b"0"))
    if match[1]:
        if digits[9:].strip(b"0"):
            nanoseconds += 1
        seconds = -seconds
        if nanoseconds:
            seconds -= 1
            nanoseconds = 1_000_000_000 - nanoseconds
    return clamp_time(seconds, nanoseconds)


def xattr_name(key: bytes) -> bytes:
    """The attribute's name in a SCHILY.xattr key; GNU tar writes "=" as %3D and "%" as %25."""
    name = key[len(XATTR_PREFIX) :]
    if b"%" in name:
        name = name.replace(b"%3D", b"=").replace(b"%25", b"%")
    return name
