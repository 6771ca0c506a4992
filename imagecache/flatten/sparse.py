"""Maps of sparse tar members: GNU type S, and the pax forms 0.0, 0.1 and 1.0.

Format: GNU tar manual, "Storing Sparse Files". A map is a list of (offset, length) of stored data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten.limits import Limits
from imagecache.flatten.paxrecords import parse_decimal
from imagecache.flatten.tarheader import BLOCK, parse_number

Segments = list[tuple[int, int]]

_MAP_NUMBER = re.compile(rb"[0-9]{1,20}")
GNU_SLOT = 24
GNU_HEADER_SLOTS = 386
GNU_EXTENSION_SLOTS = 21


def checked_segments(
    segments: Segments, stored: int, size: int, limits: Limits, where: str
) -> Segments:
    """The map without empty segments, after checks: ascending, disjoint, in `size`, of `stored`."""
    if len(segments) > limits.sparse_segments:
        raise LimitExceeded(f"{where}: sparse map has more than {limits.sparse_segments} segments")
    end = 0
    total = 0
    for offset, length in segments:
        if offset < end or length < 0:
            raise Rejected(f"{where}: sparse map overlaps or descends at offset {offset}")
        end = offset + length
        total += length
    if end > size:
        raise Rejected(f"{where}: sparse map reaches {end}, behind the file's end {size}")
    if total != stored:
        raise Rejected(f"{where}: sparse map names {total} bytes, but {stored} are stored")
    return [segment for segment in segments if segment[1]]


def gnu_segments(
    header: bytes, next_block: Callable[[], bytes], limits: Limits, where: str
) -> tuple[Segments, int]:
    """(map, real size) of a type S header and the extension blocks that follow it."""
    segments: Segments = []
    size = parse_number(header[483:495], "real size", where)
    more = _gnu_slots(header, GNU_HEADER_SLOTS, 4, segments, where) and header[482]
    while more:
        block = next_block()
        if len(segments) > limits.sparse_segments:
            raise LimitExceeded(
                f"{where}: sparse map has more than {limits.sparse_segments} segments"
            )
        more = _gnu_slots(block, 0, GNU_EXTENSION_SLOTS, segments, where) and block[504]
    if size < 0:
        raise Rejected(f"{where}: negative real size of a sparse file")
    return segments, size


def _gnu_slots(block: bytes, start: int, count: int, segments: Segments, where: str) -> bool:
    for slot in range(start, start + count * GNU_SLOT, GNU_SLOT):
        if not block[slot + 12]:
            return False  # an unused slot ends the map
        segments.append(
            (
                parse_number(block[slot : slot + 12], "sparse offset", where),
                parse_number(block[slot + 12 : slot + 24], "sparse length", where),
            )
        )
    return True


def pax_segments(numbers: Sequence[bytes], limits: Limits, where: str) -> Segments:
    """The map of forms 0.0 and 0.1 from its alternating offsets and lengths."""
    if len(numbers) % 2 or len(numbers) // 2 > limits.sparse_segments:
        raise Rejected(f"{where}: sparse map has {len(numbers)} numbers")
    values = [parse_decimal(number, "GNU.sparse.map", where) for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def data_segments(
    next_block: Callable[[], bytes], limits: Limits, where: str
) -> tuple[Segments, int]:
    """(map, bytes that it took) of form 1.0, whose map stands before the data in whole blocks."""
    text = b""
    taken = 0
    numbers: list[int] = []
    wanted = 1  # the count, then two numbers for each segment
    while len(numbers) < wanted:
        line, newline, rest = text.partition(b"\n")
        if not newline:
            if len(text) > 64:
                raise Rejected(f"{where}: sparse map has a malformed number")
            text += next_block()
            taken += BLOCK
            continue
        text = rest
        if not _MAP_NUMBER.fullmatch(line):
            raise Rejected(f"{where}: sparse map has a malformed number")
        numbers.append(int(line))
        if len(numbers) == 1:
            if numbers[0] > limits.sparse_segments:
                raise LimitExceeded(
                    f"{where}: sparse map has more than {limits.sparse_segments} segments"
                )
            wanted = 1 + 2 * numbers[0]
    return list(zip(numbers[1::2], numbers[2::2], strict=True)), taken
