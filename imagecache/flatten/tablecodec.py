"""The canonical encoding of a file table, version 1: a header, then columns (FORMAT.md).

Decoding refuses whatever the encoder would not have written.
"""

from __future__ import annotations

import struct
import sys
from array import array
from typing import NoReturn

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten import kinds
from imagecache.flatten.filetable import IMPLICIT, FileTable
from imagecache.flatten.layerpaths import WHITEOUT_PREFIX
from imagecache.flatten.limits import Limits
from imagecache.flatten.xattrs import Xattrs, checked

MAGIC = b"CCFT"
VERSION = 1
HEADER = struct.Struct("<4sHH12I")
_ATTRIBUTE = struct.Struct("<HI")
_NEXT_LOWER = 0xFFFFFFFE
_IS_BIG = sys.byteorder == "big"


def _packed(column: array[int]) -> bytes:
    if _IS_BIG and column.itemsize > 1:
        column = array(column.typecode, column)
        column.byteswap()
    return column.tobytes()


def _encode_set(xattrs: Xattrs) -> bytes:
    parts = [len(xattrs).to_bytes(2, "little")]
    for name, value in xattrs:
        parts += (_ATTRIBUTE.pack(len(name), len(value)), name, value)
    return b"".join(parts)


def _inode_codes(table: FileTable) -> array[int]:
    codes = array("I", bytes(4 * table.entry_count))
    following = 0
    count = table.inode_count
    for entry, inode in enumerate(table.entry_inode):
        if inode == following and inode < count:
            following += 1
        elif inode < count:
            codes[entry] = following - inode
        else:
            codes[entry] = IMPLICIT if inode == IMPLICIT else _NEXT_LOWER
    return codes


def encode_table(table: FileTable) -> bytes:
    """The canonical bytes of a table (see the module for the form); `contents` are left out."""
    ends = table.name_ends
    lengths = array("B", (end - start for start, end in zip(array("I", [0]) + ends, ends)))  # noqa: B905 - one start more than ends
    devices = array("I", table.extra)
    for inode, mode in enumerate(table.mode):
        if mode >> 12 == kinds.SYMLINK:
            devices[inode] = 0
    sets = [_encode_set(xattrs) for xattrs in table.xattr_sets]
    targets = b"".join(table.symlink_targets)
    lower = b"".join(table.lower_links)
    marks = table.whiteouts + table.opaques
    marks_blob = b"".join(marks)
    header = HEADER.pack(
        MAGIC,
        VERSION,
        0,
        table.entry_count,
        table.inode_count,
        len(table.names),
        len(table.symlink_targets),
        len(targets),
        len(sets),
        sum(map(len, sets)),
        len(table.lower_links),
        len(lower),
        len(table.whiteouts),
        len(table.opaques),
        len(marks_blob),
    )
    return b"".join(
        (
            header,
            _packed(table.entry_parent),
            _packed(_inode_codes(table)),
            _packed(lengths),
            table.names,
            _packed(table.mode),
            _packed(table.uid),
            _packed(table.gid),
            _packed(table.mtime),
            _packed(table.mtime_ns),
            _packed(table.size),
            _packed(devices),
            _packed(table.xattr_set),
            _packed(array("H", map(len, table.symlink_targets))),
            targets,
            _packed(array("I", map(len, sets))),
            *sets,
            _packed(array("H", map(len, table.lower_links))),
            lower,
            _packed(array("H", map(len, marks))),
            marks_blob,
        )
    )


def _bad(what: str) -> NoReturn:
    raise Rejected(f"file table is broken: {what}", remedy="fetch or build the layer again")


class _Columns:
    """Cuts the encoding into columns; every length was checked against the whole before."""

    def __init__(self, encoded: memoryview) -> None:
        self._encoded = encoded
        self._at = HEADER.size

    def take(self, size: int) -> memoryview:
        self._at += size
        return self._encoded[self._at - size : self._at]

    def column(self, typecode: str, count: int) -> array[int]:
        values: array[int] = array(typecode)
        values.frombytes(self.take(values.itemsize * count))
        if _IS_BIG and values.itemsize > 1:
            values.byteswap()
        return values

    def strings(self, typecode: str, count: int, size: int, what: str) -> list[bytes]:
        lengths = self.column(typecode, count)
        if sum(lengths) != size:
            _bad(f"{what} lengths do not sum to {size}")
        blob = bytes(self.take(size))
        result: list[bytes] = []
        start = 0
        for length in lengths:
            result.append(blob[start : start + length])
            start += length
        return result


def decode_table(encoded: bytes | memoryview, limits: Limits) -> FileTable:
    """The table of a canonical encoding. Raises `Rejected` for bytes that no encoder made,
    `LimitExceeded` over the caps; sizes are checked before anything is allocated."""
    view = memoryview(encoded)
    if len(view) < HEADER.size or bytes(view[:4]) != MAGIC:
        _bad("it has no file table's magic")
    if len(view) > limits.table_bytes:
        raise LimitExceeded(f"file table has {len(view)} bytes, over {limits.table_bytes}")
    (_, version, flags, *counts) = HEADER.unpack_from(view)
    if version != VERSION or flags:
        _bad(f"version {version} with flags {flags} is not {VERSION} with 0: needs a newer reader")
    (entries, inodes, name_bytes, links, link_bytes, sets, set_bytes) = counts[:7]
    (lower, lower_bytes, whiteouts, opaques, mark_bytes) = counts[7:]
    if max(entries, inodes, lower, whiteouts, opaques) > limits.entries:
        raise LimitExceeded(f"file table has more than {limits.entries} entries")
    size = HEADER.size + 9 * entries + name_bytes + 38 * inodes + 2 * links + link_bytes
    size += 4 * sets + set_bytes + 2 * lower + lower_bytes + 2 * (whiteouts + opaques) + mark_bytes
    if size != len(view):
        _bad(f"it has {len(view)} bytes, and its counts say {size}")
    columns = _Columns(view)
    parents = columns.column("I", entries)
    codes = columns.column("I", entries)
    lengths = columns.column("B", entries)
    names = bytes(columns.take(name_bytes))
    mode = columns.column("H", inodes)
    uid = columns.column("I", inodes)
    gid = columns.column("I", inodes)
    mtime = columns.column("q", inodes)
    mtime_ns = columns.column("I", inodes)
    sizes = columns.column("Q", inodes)
    extra = columns.column("I", inodes)
    xattr_set = columns.column("I", inodes)
    targets = columns.strings("H", links, link_bytes, "symlink")
    encoded_sets = columns.strings("I", sets, set_bytes, "xattr set")
    lower_links = columns.strings("H", lower, lower_bytes, "lower link")
    marks = columns.strings("H", whiteouts + opaques, mark_bytes, "whiteout")
    ends, entry_inode = _check_entries(
        parents, codes, lengths, names=names, mode=mode, lower=lower, limits=limits
    )
    _check_inodes(mode, sizes, extra, targets, limits)
    if inodes and (max(uid) == 0xFFFFFFFF or max(gid) == 0xFFFFFFFF or max(mtime_ns) > 999_999_999):
        _bad("an owner or a time is out of range")
    xattr_sets = _check_xattrs(encoded_sets, xattr_set, mode, limits)
    for target in targets:
        if not 0 < len(target) <= limits.symlink_bytes or b"\0" in target:
            _bad("a symlink target is out of range")
    for path in lower_links:
        _check_path(path, limits)
    for group in (marks[:whiteouts], marks[whiteouts:]):
        for index, path in enumerate(group):
            if path or group is marks[:whiteouts]:
                _check_path(path, limits, may_be_root=True)
            if index and group[index - 1] >= path:
                _bad("whiteouts are not in order")
    return FileTable(
        entry_parent=parents,
        entry_inode=entry_inode,
        names=names,
        name_ends=ends,
        mode=mode,
        uid=uid,
        gid=gid,
        mtime=mtime,
        mtime_ns=mtime_ns,
        size=sizes,
        extra=extra,
        xattr_set=xattr_set,
        symlink_targets=targets,
        xattr_sets=xattr_sets,
        lower_links=lower_links,
        whiteouts=marks[:whiteouts],
        opaques=marks[whiteouts:],
    )


def _check_path(path: bytes, limits: Limits, *, may_be_root: bool = False) -> None:
    if not path and may_be_root:
        return
    parts = path.split(b"/")
    if (
        len(path) > limits.path_bytes
        or b"\0" in path
        or any(part in (b"", b".", b"..") or len(part) > limits.name_bytes for part in parts)
    ):
        _bad("a path is malformed")


def _check_entries(
    parents: array[int],
    codes: array[int],
    lengths: array[int],
    *,
    names: bytes,
    mode: array[int],
    lower: int,
    limits: Limits,
) -> tuple[array[int], array[int]]:
    """(name ends, inode of each entry) after checks of names, order, parents and numbering."""
    if not parents or lengths[0] or parents[0]:
        _bad("its first entry is not the root")
    if b"\0" in names or b"/" in names:
        _bad("a name holds a NUL or a slash")
    inodes = len(mode)
    ends = array("I", bytes(4 * len(parents)))
    numbers = array("I", bytes(4 * len(parents)))
    directories: dict[int, bytes] = {}
    linked: set[int] = set()
    previous = b""
    start = following = links = total = 0
    for entry, (parent, code, length) in enumerate(zip(parents, codes, lengths, strict=True)):
        end = start + length
        name = names[start:end]
        ends[entry] = start = end
        if entry:
            above = directories.get(parent)
            if above is None:
                _bad(f"entry {entry} has no directory above it")
            path = above + b"/" + name if above else name
            if path <= previous or not name or name in (b".", b".."):
                _bad(f"entry {entry} is out of order or has no name")
            if name.startswith(WHITEOUT_PREFIX):
                _bad(f"entry {entry} has a whiteout's name")
            if len(path) > limits.path_bytes:
                _bad(f"entry {entry} has too long a path")
            total += len(path)
            previous = path
        else:
            path = b""
        if code == 0:
            number = following
            following += 1
            if number >= inodes:
                _bad(f"entry {entry} names an inode that is not there")
            if mode[number] >> 12 == kinds.DIRECTORY:
                directories[entry] = path
        elif code == IMPLICIT:
            number = IMPLICIT
            directories[entry] = path
        elif code == _NEXT_LOWER:
            number = inodes + links
            links += 1
        else:
            number = following - code
            if number < 0:
                _bad(f"entry {entry} links to an inode that is not there")
            linked.add(number)
        numbers[entry] = number
    if start != len(names) or following != inodes or links != lower:
        _bad("its names, inodes or links are not all used")
    if total > limits.path_total_bytes:
        raise LimitExceeded(f"file table's paths have more than {limits.path_total_bytes} bytes")
    if 0 not in directories or any(mode[number] >> 12 == kinds.DIRECTORY for number in linked):
        _bad("its root is no directory, or a directory has two names")
    return ends, numbers


def _check_inodes(
    mode: array[int],
    sizes: array[int],
    extra: array[int],
    targets: list[bytes],
    limits: Limits,
) -> None:
    """Check kinds and what each may carry; give symlinks their running target number."""
    symlinks = 0
    if sum(sizes) > limits.logical_bytes:
        raise LimitExceeded(f"file table's files have more than {limits.logical_bytes} bytes")
    for inode, bits in enumerate(mode):
        kind = bits >> 12
        if kind == kinds.REGULAR:
            if extra[inode]:
                _bad(f"inode {inode} is no device, but has a number")
            continue
        if kind not in kinds.FILE_KINDS or sizes[inode]:
            _bad(f"inode {inode} is of no known kind, or has a size though it is no file")
        if kind == kinds.SYMLINK:
            if extra[inode] or symlinks >= len(targets):
                _bad(f"inode {inode} has no symlink target")
            extra[inode] = symlinks
            symlinks += 1
        elif extra[inode] and kind not in kinds.DEVICES:
            _bad(f"inode {inode} is no device, but has a number")
    if symlinks != len(targets):
        _bad("a symlink target is not used")


def _check_xattrs(
    encoded: list[bytes], column: array[int], mode: array[int], limits: Limits
) -> list[Xattrs]:
    """The decoded sets, after checks of their form, their use and their first-use order."""
    sets: list[Xattrs] = []
    for blob in encoded:
        found: list[tuple[bytes, bytes]] = []
        at = 2
        for _ in range(int.from_bytes(blob[:2], "little")):
            if at + _ATTRIBUTE.size > len(blob):
                _bad("an xattr set is cut short")
            name_size, value_size = _ATTRIBUTE.unpack_from(blob, at)
            at += _ATTRIBUTE.size
            name = blob[at : at + name_size]
            at += name_size
            found.append((name, blob[at : at + value_size]))
            at += value_size
        if at != len(blob) or not found:
            _bad("an xattr set has a wrong length")
        sets.append(tuple(found))
    if len(set(sets)) != len(sets):
        _bad("two xattr sets are equal")
    seen = 0
    approved: set[tuple[int, int]] = set()
    for inode, number in enumerate(column):
        if not number:
            continue
        if number > seen + 1 or number > len(sets):
            _bad("xattr sets are not in order of use")
        seen = max(seen, number)
        kind = mode[inode] >> 12
        if (number, kind) not in approved:
            xattrs = sets[number - 1]
            if checked(dict(xattrs), kind, limits, f"file table's inode {inode}") != xattrs:
                _bad("an xattr set is not in order, or holds what is never kept")
            approved.add((number, kind))
    if seen != len(sets):
        _bad("an xattr set is not used")
    return sets
