"""The map of an overlay on disk: a header and an append-only journal of checksummed records.

A record reaches the kernel before the write that it stands for is answered, so it outlives the
process. After a power loss only records that a MARK covers are believed: their data was synced
before the MARK was written. The journal owns its file and the lock on it.

Byte table (big endian). Header, 512 bytes: magic 8, version u32, block size u32, size u64, base
size u64, identity length u16, identity, zeros, CRC-32 u32 of all before it. Record, 32 bytes: kind
u32, sequence u64, first u64, second u64, CRC-32 u32 of all before it.
"""

import contextlib
import errno
import fcntl
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from struct import Struct

BLOCK = 4096
HEADER_SIZE = 512
_MAGIC = b"NBDOVRL\n"
_VERSION = 1
_HEADER = Struct(">8sIIQQH")
_RECORD = Struct(">IQQQ")
_CRC = Struct(">I")
RECORD_SIZE = _RECORD.size + _CRC.size
MAX_IDENTITY = HEADER_SIZE - _HEADER.size - _CRC.size


class OverlayError(Exception):
    """An overlay that cannot be opened: damaged, in use, or made on another base."""


class Kind(IntEnum):
    """Records: DATA and ZERO are (first block, blocks), MARK is (journal bytes covered, 0), OPEN is
    the boot that wrote what follows (16 bytes), GROW is (new size, 0)."""

    DATA = 1
    ZERO = 2
    MARK = 3
    OPEN = 4
    GROW = 5


@dataclass(frozen=True)
class Header:
    """Sizes in bytes; `identity` names the base that the overlay was made on."""

    size: int
    base_size: int
    identity: bytes

    def encode(self) -> bytes:
        """The 512 bytes on disk."""
        if len(self.identity) > MAX_IDENTITY:
            raise OverlayError(f"a base identity of {len(self.identity)} bytes")
        head = _HEADER.pack(_MAGIC, _VERSION, BLOCK, self.size, self.base_size, len(self.identity))
        body = (head + self.identity).ljust(HEADER_SIZE - _CRC.size, b"\0")
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def decode(cls, raw: bytes) -> "Header":
        """Raises OverlayError for anything that `encode` did not make."""
        if len(raw) != HEADER_SIZE:
            raise OverlayError("the overlay's header is cut short")
        (crc,) = _CRC.unpack_from(raw, HEADER_SIZE - _CRC.size)
        magic, version, block, size, base_size, length = _HEADER.unpack_from(raw)
        if magic != _MAGIC or zlib.crc32(raw[: -_CRC.size]) != crc:
            raise OverlayError("the overlay's header is damaged, or this is no overlay")
        if version != _VERSION or block != BLOCK:
            raise OverlayError(f"overlay format {version} with blocks of {block} is not known here")
        if length > MAX_IDENTITY:
            raise OverlayError("the overlay's header is damaged")
        return cls(size, base_size, raw[_HEADER.size : _HEADER.size + length])


def encode_record(kind: int, sequence: int, first: int, second: int) -> bytes:
    """One record."""
    body = _RECORD.pack(kind, sequence, first, second)
    return body + _CRC.pack(zlib.crc32(body))


def decode_records(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, first, second) of the records in order, up to the first that is not whole."""
    for sequence, at in enumerate(range(0, len(raw) - RECORD_SIZE + 1, RECORD_SIZE)):
        kind, number, first, second = _RECORD.unpack_from(raw, at)
        (crc,) = _CRC.unpack_from(raw, at + _RECORD.size)
        if crc != zlib.crc32(raw[at : at + _RECORD.size]) or number != sequence:
            return
        yield kind, first, second


def believed_records(raw: bytes, boot: bytes) -> tuple[list[tuple[int, int, int]], int]:
    """The records to replay, and how many whole records there are.

    Those written in this boot are believed: the kernel still has what they stand for. Of those from
    an earlier boot, the ones that a MARK covers.
    """
    whole = list(decode_records(raw))
    trusted = 0
    this_boot_from = len(whole)
    for index, (kind, first, second) in enumerate(whole):
        if kind == Kind.MARK:
            trusted = max(trusted, min(first // RECORD_SIZE, index))
        elif kind == Kind.OPEN:
            same = first.to_bytes(8, "big") + second.to_bytes(8, "big") == boot
            if not same:
                this_boot_from = len(whole)
            elif this_boot_from == len(whole):
                this_boot_from = index
    believed = whole[:trusted] + whole[max(trusted, this_boot_from) :]
    return believed, len(whole)


def boot_identity() -> bytes:
    """16 bytes that change with every boot of this kernel."""
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))


class Journal:
    """An open, locked journal. Every method blocks, but `append` only as long as the page cache."""

    def __init__(self, path: Path, fd: int, header: Header, records: list[tuple[int, int, int]]):
        self.path = path
        self.header = header
        self.records = records
        self._fd = fd
        self._sequence = 0

    @classmethod
    def create(cls, path: Path, header: Header) -> None:
        """Make an empty journal. Raises FileExistsError."""
        raw = header.encode()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, raw)
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_directory(path.parent)

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Lock and read a journal, cut a torn end. Raises OverlayError."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError as failure:
            raise OverlayError(f"no overlay at {path.parent}") from failure
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as failure:
                raise OverlayError(f"overlay {path.parent} is in use") from failure
            raw = _read_all(fd)
            header = Header.decode(raw[:HEADER_SIZE])
            boot = boot_identity()
            believed, whole = believed_records(raw[HEADER_SIZE:], boot)
            journal = cls(path, fd, header, believed)
            journal._begin(believed, whole)
        except BaseException:
            os.close(fd)
            raise
        return journal

    def _begin(self, believed: list[tuple[int, int, int]], whole: int) -> None:
        """Go on after the last whole record, or start anew where records were dropped."""
        os.ftruncate(self._fd, HEADER_SIZE + whole * RECORD_SIZE)
        self._sequence = whole
        if len(believed) != whole:
            self.rewrite(
                [(kind, a, b) for kind, a, b in believed if kind not in (Kind.MARK, Kind.OPEN)]
            )
        self.mark_boot()

    @property
    def length(self) -> int:
        """Bytes of records."""
        return self._sequence * RECORD_SIZE

    def append(self, kind: Kind, first: int, second: int) -> None:
        """Give a record to the kernel. Raises OSError (ENOSPC), and then nothing was appended."""
        record = encode_record(kind, self._sequence, first, second)
        at = HEADER_SIZE + self._sequence * RECORD_SIZE
        if os.pwrite(self._fd, record, at) != RECORD_SIZE:
            raise OSError(errno.ENOSPC, "the journal could not grow")
        self._sequence += 1

    def sync(self) -> None:
        """Make all records durable. Data that a MARK covers must have been synced before it."""
        os.fdatasync(self._fd)

    def rewrite(self, records: list[tuple[int, int, int]]) -> None:
        """Replace all records (their data was synced before) by these, in one step."""
        draft = self.path.with_suffix(".new")
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            covered = len(records) * RECORD_SIZE
            marked = [*records, (int(Kind.MARK), covered, 0)]
            raw = self.header.encode() + b"".join(
                encode_record(kind, sequence, first, second)
                for sequence, (kind, first, second) in enumerate(marked)
            )
            with open(fd, "wb", closefd=False) as file:
                file.write(raw)
            os.fsync(fd)
            draft.rename(self.path)
            sync_directory(self.path.parent)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                draft.unlink()
            raise
        os.close(self._fd)
        self._fd = fd
        self._sequence = len(marked)

    def mark_boot(self) -> None:
        """Append which boot writes what follows (after `rewrite`)."""
        boot = boot_identity()
        self.append(Kind.OPEN, int.from_bytes(boot[:8], "big"), int.from_bytes(boot[8:], "big"))

    def close(self) -> None:
        """Unlock and close."""
        os.close(self._fd)


def sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_all(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    pieces, at = [], 0
    while at < size:
        piece = os.pread(fd, min(size - at, 1 << 24), at)
        if not piece:
            break
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)
