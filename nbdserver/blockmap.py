"""Which blocks of an overlay hold data, read as zeros, or are the base's; and its data file."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nbdserver.device import Buffer
from nbdserver.journal import BLOCK, Header, Kind, OverlayError

FROM_BASE, OWN_DATA, OWN_ZERO = 0, 1, 2
_RUNS = re.compile(rb"\x00+|\x01+|\x02+")


class BlockMap:
    """The state of each block, in one byte, and how many hold data. Pure."""

    def __init__(self, size: int, base_size: int) -> None:
        blocks = -(-size // BLOCK)
        from_base = min(-(-base_size // BLOCK), blocks)
        self.states = bytearray(from_base) + bytes((OWN_ZERO,)) * (blocks - from_base)
        self.data_blocks = 0

    def set(self, first: int, count: int, state: int) -> None:
        self.data_blocks -= self.states.count(OWN_DATA, first, first + count)
        if state == OWN_DATA:
            self.data_blocks += count
        self.states[first : first + count] = bytes((state,)) * count

    def all_are(self, first: int, count: int, state: int) -> bool:
        return self.states.count(state, first, first + count) == count

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(state, first block, blocks) of maximal runs."""
        for match in _RUNS.finditer(self.states, first, first + count):
            start, end = match.span()
            yield self.states[start], start, end - start


def replay(header: Header, records: list[tuple[int, int, int]]) -> tuple[int, BlockMap]:
    size = header.size
    for kind, first, _second in records:
        if kind == Kind.GROW:
            size = max(size, first)
    found = BlockMap(size, header.base_size)
    blocks = len(found.states)
    for kind, first, second in records:
        if kind in (Kind.DATA, Kind.ZERO):
            if first + second > blocks:
                raise OverlayError("the overlay's journal names blocks beyond its end")
            found.set(first, second, OWN_DATA if kind == Kind.DATA else OWN_ZERO)
    return size, found


def make_data(path: Path, room: int) -> None:
    """Create or lengthen the data file."""
    fd = os.open(path / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size < room:
            os.ftruncate(fd, room)
        os.fsync(fd)
    finally:
        os.close(fd)


def open_data(path: Path, room: int) -> int:
    try:
        fd = os.open(path / "data", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as failure:
        raise OverlayError(f"overlay {path} has lost its data file") from failure
    size = os.fstat(fd).st_size
    if size < room:
        os.close(fd)
        raise OverlayError(f"overlay {path}: its data file has {size} bytes instead of {room}")
    return fd


def write_all(fd: int, offset: int, payload: Buffer) -> None:
    written = os.pwrite(fd, payload, offset)
    while written < len(payload):
        more = os.pwrite(fd, memoryview(payload)[written:], offset + written)
        if more == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += more
