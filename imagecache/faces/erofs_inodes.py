"""EROFS inodes: sizes, packing, inline xattrs, and one section of inodes per layer.

Format: Linux fs/erofs/erofs_fs.h. Inodes stand on 32-byte slots; a compact one takes 32 bytes (its
time is the superblock's build time, which we leave at 0), an extended one 64. Inline xattrs follow,
then an inline tail. We keep core, xattrs and tail inside one block where they fit into one, which
every kernel reads.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass

from imagecache.errors import LimitExceeded
from imagecache.flatten import kinds
from imagecache.flatten.filetable import FileTable, region_layout
from imagecache.flatten.kinds import shown
from imagecache.flatten.xattrs import ACL_ACCESS, ACL_DEFAULT, Xattrs

BLOCK = 4096
SLOT = 32
COMPACT = struct.Struct("<HHHHIIIIHHI")
EXTENDED = struct.Struct("<HHHHQIIIIqII16x")
XATTR_ENTRY = struct.Struct("<BBH")
FLAT_PLAIN = 0
FLAT_INLINE = 2
NO_BLOCK = 0xFFFFFFFF
MAX_XATTR_COUNT = 0xFFFF

# file type in directory entries, by kind
DIRENT_TYPES = {
    kinds.REGULAR: 1,
    kinds.DIRECTORY: 2,
    kinds.CHARACTER: 3,
    kinds.BLOCK_DEVICE: 4,
    kinds.FIFO: 5,
    kinds.SOCKET: 6,
    kinds.SYMLINK: 7,
}
_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))


@dataclass(frozen=True, slots=True)
class Attributes:
    """What both inode forms hold, but for layout and address; `size` in bytes."""

    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_ns: int
    links: int
    size: int

    def is_compact(self) -> bool:
        """Whether the 32-byte form holds all of it."""
        return (
            self.mtime == 0
            and self.mtime_ns == 0
            and max(self.uid, self.gid, self.links) <= 0xFFFF
            and self.size <= 0xFFFFFFFF
        )


def pack_inode(item: Attributes, layout: int, xattr_count: int, address: int, number: int) -> bytes:
    """The core of one inode; `address` is a start block or a device number."""
    if item.is_compact():
        return COMPACT.pack(
            layout << 1,
            xattr_count,
            item.mode,
            item.links,
            item.size,
            0,
            address,
            number,
            item.uid,
            item.gid,
            0,
        )
    return EXTENDED.pack(
        layout << 1 | 1,
        xattr_count,
        item.mode,
        0,
        item.size,
        address,
        number,
        item.uid,
        item.gid,
        item.mtime,
        item.mtime_ns,
        item.links,
    )


def pack_xattrs(xattrs: Xattrs, owner: str) -> bytes:
    """The inline xattr body: 12 zero bytes, then 4-byte-aligned entries; b"" for none."""
    if not xattrs:
        return b""
    parts = [bytes(12)]
    for name, value in xattrs:
        index, suffix = 0, b""
        if name == ACL_ACCESS:
            index = 2
        elif name == ACL_DEFAULT:
            index = 3
        else:
            for prefix, number in _PREFIXES:
                if name.startswith(prefix):
                    index, suffix = number, name[len(prefix) :]
        if not index or len(suffix) > 255 or len(value) > 0xFFFF:
            raise LimitExceeded(f"{owner}: EROFS cannot hold the attribute {shown(name)}")
        entry = XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        parts.append(entry + bytes(-len(entry) % 4))
    body = b"".join(parts)
    if xattr_count(body) > MAX_XATTR_COUNT:
        raise LimitExceeded(f"{owner}: its extended attributes are too large for EROFS")
    return body


def xattr_count(body: bytes) -> int:
    """The inode's i_xattr_icount for a body: units of 4 bytes after the header, plus one."""
    return (len(body) - 12) // 4 + 1 if body else 0


def device_word(rdev: int) -> int:
    """Linux's new_encode_dev: 12 bits of major between 8 and 12 bits of minor."""
    major, minor = rdev >> 20, rdev & 0xFFFFF
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def padded_blocks(blocks: int) -> int:
    """A part's blocks with up to an eighth of slack, in steps of 8 blocks or a power of two.

    What follows then keeps its place while the part grows a little; zero blocks cost nothing.
    """
    step = max(8, 1 << max(blocks // 8, 1).bit_length() - 1)
    return -(-blocks // step) * step


def place(offset: int, whole: int, core: int) -> int:
    """The slot at or after `offset` for an inode of `whole` bytes (core, xattrs, inline tail).

    It stays in one block if it fits into one; else its core does (inline tails always fit).
    """
    offset = -(-offset // SLOT) * SLOT
    span = whole if whole <= BLOCK else core
    if offset % BLOCK + span > BLOCK:
        offset = -(-offset // BLOCK) * BLOCK
    return offset


class LayerSection:
    """The inodes of one layer's files (no directories), dead ones too, in file-table order.

    So the section depends on the layer and its region's address alone, but for link counts that
    other layers change. Long symlinks take a block each behind the inodes.
    """

    def __init__(self, table: FileTable, live_links: array[int]) -> None:
        """`live_links`: names of each inode in the merged tree; 0 for the dead."""
        self._table = table
        self.offsets = array("Q", bytes(8 * table.inode_count))
        self._links = array("I", bytes(4 * table.inode_count))
        self._bodies = [
            pack_xattrs(xattrs, f"extended attribute set {number}")
            for number, xattrs in enumerate(table.xattr_sets)
        ]
        self._long_symlinks: list[int] = []
        end = 0
        own_links = table.links
        for inode, mode in enumerate(table.mode):
            kind = mode >> 12
            if kind == kinds.DIRECTORY:
                continue
            links = self._links[inode] = live_links[inode] or own_links[inode]
            core = 32 if self._is_compact(inode, links) else 64
            number = table.xattr_set[inode]
            whole = core + (len(self._bodies[number - 1]) if number else 0)
            if kind == kinds.SYMLINK:
                length = len(table.target(inode))
                if whole + length <= BLOCK:
                    whole += length
                else:
                    self._long_symlinks.append(inode)
            end = -(-end // SLOT) * SLOT
            if end % BLOCK + whole > BLOCK:
                end = place(end, whole, core)
            self.offsets[inode] = end
            end += whole
        self._inode_blocks = -(-end // BLOCK)
        self.blocks = padded_blocks(self._inode_blocks + len(self._long_symlinks))

    def _is_compact(self, inode: int, links: int) -> bool:
        table = self._table
        return (
            table.mtime[inode] == 0
            and table.mtime_ns[inode] == 0
            and max(table.uid[inode], table.gid[inode], links) <= 0xFFFF
            and table.size[inode] <= 0xFFFFFFFF
        )

    def write(self, section_start: int, region_start: int) -> bytes:
        """The section's bytes, when it begins at block `section_start` of the disk."""
        table = self._table
        out = bytearray(self.blocks * BLOCK)
        layout = region_layout(table)
        address = dict(zip(layout.inodes, layout.start_blocks, strict=True))
        long_symlinks = {inode: order for order, inode in enumerate(self._long_symlinks)}
        pack_extended = EXTENDED.pack_into
        for inode, (mode, offset, uid, gid, mtime, ns, size, links, number) in enumerate(
            zip(
                table.mode,
                self.offsets,
                table.uid,
                table.gid,
                table.mtime,
                table.mtime_ns,
                table.size,
                self._links,
                table.xattr_set,
                strict=True,
            )
        ):
            kind = mode >> 12
            if kind == kinds.DIRECTORY:
                continue
            body = self._bodies[number - 1] if number else b""
            form = FLAT_PLAIN
            word = 0
            tail = b""
            length = size
            if kind == kinds.REGULAR:
                word = region_start + address[inode] if size else NO_BLOCK
            elif kind == kinds.SYMLINK:
                tail = table.target(inode)
                length = len(tail)
                order = long_symlinks.get(inode)
                if order is None:
                    form = FLAT_INLINE
                else:
                    block = self._inode_blocks + order
                    word = section_start + block
                    out[block * BLOCK : block * BLOCK + length] = tail
                    tail = b""
            elif kind in kinds.DEVICES:
                word = device_word(table.extra[inode])
            count = xattr_count(body)
            if mtime or ns or not self._is_compact(inode, links):
                pack_extended(
                    out,
                    offset,
                    form << 1 | 1,
                    count,
                    mode,
                    0,
                    length,
                    word,
                    inode + 1,
                    uid,
                    gid,
                    mtime,
                    ns,
                    links,
                )
                after = offset + 64
            else:
                COMPACT.pack_into(
                    out,
                    offset,
                    form << 1,
                    count,
                    mode,
                    links,
                    length,
                    0,
                    word,
                    inode + 1,
                    uid,
                    gid,
                    0,
                )
                after = offset + 32
            if body or tail:
                out[after : after + len(body) + len(tail)] = body + tail
        return bytes(out)
