"""EROFS directories: entry blocks, and the section that holds them with their inodes.

Format: Linux fs/erofs/erofs_fs.h, Documentation/filesystems/erofs.rst. All names are sorted
bytewise, "." and ".." among them (lookups bisect). Each block starts with its 12-byte entries,
names behind them; only the last block may be an inline tail of the inode.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from imagecache.faces.erofs_inodes import (
    BLOCK,
    FLAT_INLINE,
    FLAT_PLAIN,
    Attributes,
    pack_inode,
    padded_blocks,
    place,
    xattr_count,
)

_DIRENT = struct.Struct("<QHBB")
DIRENT = 12
MIN_SLOT = 256


class DirectoryShape:
    """How one directory's names fall into blocks; fixed by the names alone."""

    __slots__ = ("blocks", "body", "names", "offset", "tail")

    def __init__(self, children: Iterable[bytes], body: bytes) -> None:
        """`children`: its names; `body`: its packed inline xattrs."""
        self.body = body
        self.offset = 0  # of the inode in its section
        names = [b".", b"..", *children]
        names.sort()
        self.names = [names]  # one list for each block
        used = DIRENT * len(names) + sum(map(len, names))
        if used > BLOCK:
            self.names = []
            current: list[bytes] = []
            used = 0
            for name in names:
                need = DIRENT + len(name)
                if used + need > BLOCK:
                    self.names.append(current)
                    current = []
                    used = 0
                current.append(name)
                used += need
            self.names.append(current)
        self.blocks = len(self.names) - 1  # those in front of the last one
        self.tail = used

    @property
    def size(self) -> int:
        """The directory's i_size."""
        return self.blocks * BLOCK + self.tail

    def inline(self, core: int, room: int = BLOCK) -> bool:
        """Whether the last block fits behind the inode, in `room` bytes of one block."""
        return core + len(self.body) + self.tail <= room


def entry_block(names: list[bytes], resolve: Callable[[bytes], tuple[int, int]]) -> bytes:
    """One block's entries and names; `resolve` gives the (nid, file type) of a name."""
    at = DIRENT * len(names)
    parts: list[bytes] = []
    for name in names:
        nid, file_type = resolve(name)
        parts.append(_DIRENT.pack(nid, at, file_type, 0))
        at += len(name)
    return b"".join(parts) + b"".join(names)


class DirectorySection:
    """All directories but the root in tree order, then the entry blocks that are not inline."""

    def __init__(self, root: DirectoryShape, *, root_is_inline: bool) -> None:
        self._shapes: list[tuple[DirectoryShape, bool]] = []
        self._end = 0
        self._blocks = 0
        self._first_block: list[int] = []
        self.root_is_inline = root_is_inline
        self._blocks += root.blocks + (not root_is_inline)

    def begin_group(self) -> None:
        """Leave room behind the directories so far, so that they may grow without moving others."""
        self._end = padded_blocks(-(-self._end // BLOCK)) * BLOCK

    def add(self, shape: DirectoryShape, attributes: Attributes, *, roomy: bool) -> int:
        """Place one directory; the offset of its inode in this section.

        A `roomy` one (which layers share, and so often change) gets a slot of a power of two, and
        keeps the ones behind it in place while it grows inside.
        """
        core = 32 if attributes.is_compact() else 64
        inline = shape.inline(core)
        self._take(shape, core, inline=inline, roomy=roomy)
        self._shapes.append((shape, inline))
        self._first_block.append(self._blocks)
        self._blocks += shape.blocks + (not inline)
        return shape.offset

    def leave_out(self, shape: DirectoryShape, attributes: Attributes) -> None:
        """Leave the place of a directory that stands elsewhere, so that others keep theirs."""
        core = 32 if attributes.is_compact() else 64
        inline = shape.inline(core)
        self._take(shape, core, inline=inline, roomy=False)
        self._blocks += shape.blocks + (not inline)

    def _take(self, shape: DirectoryShape, core: int, *, inline: bool, roomy: bool) -> None:
        whole = core + len(shape.body) + (shape.tail if inline else 0)
        taken = whole
        if roomy and whole <= BLOCK:
            taken = min(BLOCK, max(MIN_SLOT, 1 << (whole + whole // 8).bit_length()))
            shape.offset = -(-self._end // taken) * taken
        else:
            shape.offset = place(self._end, whole, core)
        self._end = shape.offset + taken

    @property
    def inode_blocks(self) -> int:
        """Blocks of inodes, before the entry blocks."""
        return padded_blocks(-(-self._end // BLOCK))

    @property
    def blocks(self) -> int:
        """Blocks of the whole section."""
        return self.inode_blocks + self._blocks

    def begin(self, start: int) -> SectionWriter:
        """A writer for the section at block `start` of the disk; the root's blocks come first."""
        return SectionWriter(self, start)

    def shapes(self) -> list[tuple[DirectoryShape, bool, int]]:
        """(shape, is inline, first entry block) of each directory in the order added."""
        return [
            (shape, inline, first)
            for (shape, inline), first in zip(self._shapes, self._first_block, strict=True)
        ]


class SectionWriter:
    """Fills a directory section's bytes."""

    def __init__(self, section: DirectorySection, start: int) -> None:
        self._entries_at = section.inode_blocks
        self._start = start
        self._out = bytearray(section.blocks * BLOCK)

    def address(self, first: int) -> int:
        """The disk block of the section's entry block number `first`."""
        return self._start + self._entries_at + first

    def put_blocks(self, first: int, blocks: list[bytes]) -> None:
        """Write entry blocks one after the other from number `first`."""
        at = (self._entries_at + first) * BLOCK
        for block in blocks:
            self._out[at : at + len(block)] = block
            at += BLOCK

    def put_inode(self, offset: int, inode: bytes) -> None:
        """Write an inode with all that follows it inline."""
        self._out[offset : offset + len(inode)] = inode

    def finish(self) -> bytes:
        """The section."""
        return bytes(self._out)


def directory_inode(
    shape: DirectoryShape, attributes: Attributes, *, address: int, number: int, tail: bytes | None
) -> bytes:
    """Core, xattrs and inline tail (None: all of it stands in blocks) of a directory."""
    form = FLAT_PLAIN if tail is None else FLAT_INLINE
    core = pack_inode(attributes, form, xattr_count(shape.body), address, number)
    return core + shape.body + (tail or b"")
