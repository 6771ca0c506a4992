"""Blocks behind the inode tables of an ext4 face: handed out in order, attribute blocks shared."""

from __future__ import annotations

from imagecache.faces.ext4_inodes import BLOCK
from imagecache.faces.ext4_xattrs import MAX_SHARED, PackedXattrs, pack_xattrs, with_references
from imagecache.flatten.filetable import FileTable

NO_XATTRS = PackedXattrs(b"", b"")


class TableBlocks:
    """The blocks behind the inode tables, handed out in order."""

    def __init__(self, start: int) -> None:
        """`start` is the first block's address."""
        self._start = start
        self._parts: list[bytes] = []

    def add(self, block: bytes) -> int:
        """Takes a block, padded with zeros; its address."""
        self._parts.append(block.ljust(BLOCK, b"\0"))
        return self._start + len(self._parts) - 1

    def add_all(self, blocks: list[bytes]) -> int:
        """Takes whole blocks that follow each other; the first one's address."""
        first = self._start + len(self._parts)
        self._parts.extend(blocks)
        return first

    def __len__(self) -> int:
        return len(self._parts)

    def join(self) -> bytes:
        """All blocks."""
        return b"".join(self._parts)


class LayerXattrs:
    """Packed attribute sets of one layer; blocks are shared by up to 1024 inodes.

    Reference counts are known from a first pass over the users (`expect`).
    """

    def __init__(self, table: FileTable) -> None:
        self._table = table
        self._packed: dict[int, PackedXattrs] = {}
        self._users: dict[int, int] = {}
        self._given: dict[int, int] = {}
        self._address: dict[int, int] = {}

    def packed(self, inode: int) -> PackedXattrs:
        """The set of an inode in ext4's form; LimitExceeded."""
        number = self._table.xattr_set[inode]
        if not number:
            return NO_XATTRS
        packed = self._packed.get(number)
        if packed is None:
            packed = pack_xattrs(self._table.xattr_sets[number - 1], self._table.first_path(inode))
            self._packed[number] = packed
        return packed

    def expect(self, inode: int) -> int:
        """Count one user in the first pass; the blocks (0 or 1) that this one adds."""
        if not self.packed(inode).block:
            return 0
        number = self._table.xattr_set[inode]
        self._users[number] = self._users.get(number, 0) + 1
        return int(self._users[number] % MAX_SHARED == 1)

    def place(self, inode: int, blocks: TableBlocks) -> tuple[bytes, int]:
        """(in-inode part, block address or 0) for one user, in the order of the first pass."""
        packed = self.packed(inode)
        if not packed.block:
            return packed.in_inode, 0
        number = self._table.xattr_set[inode]
        given = self._given.get(number, 0)
        if given % MAX_SHARED == 0:
            sharing = min(MAX_SHARED, self._users[number] - given)
            self._address[number] = blocks.add(with_references(packed.block, sharing))
        self._given[number] = given + 1
        return packed.in_inode, self._address[number]
