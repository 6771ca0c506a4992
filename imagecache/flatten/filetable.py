"""The file table of one layer: its final entries after its own duplicates, as packed columns.

Entries are the names in bytewise order of their full paths (entry 0 is the root, path b"");
inodes are the files, in order of their first name. An entry's `entry_inode` is an inode, or
`IMPLICIT` for a directory that no tar entry described, or `inode_count + k` for the k-th hard link
to a file of the layers below. Whiteouts and opaque directories are paths that act on the layers
below before the entries do. `contents` are the builder's spool ids: transient, in no encoding.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from imagecache.flatten import kinds
from imagecache.flatten.limits import Limits
from imagecache.flatten.xattrs import Xattrs

BLOCK = 4096
IMPLICIT = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """Where each non-empty regular inode of a layer stands in the layer's data region.

    Columns of equal length in file-table order; addresses are blocks from the region's start.
    """

    inodes: array[int]
    start_blocks: array[int]
    blocks: array[int]
    total_blocks: int

    def find(self, block: int) -> int | None:
        """The ordinal in these columns of the file that holds region block `block`."""
        if not 0 <= block < self.total_blocks:
            return None
        return bisect_right(self.start_blocks, block) - 1


@dataclass(slots=True)
class FileTable:
    """One layer's entries and inodes (see the module); immutable once built or decoded."""

    # One item per entry.
    entry_parent: array[int]  # 'I'; of the root: 0
    entry_inode: array[int]  # 'I'
    names: bytes  # all entry names, one after the other
    name_ends: array[int]  # 'I', into names
    # One item per inode.
    mode: array[int]  # 'H', with type bits
    uid: array[int]  # 'I'
    gid: array[int]  # 'I'
    mtime: array[int]  # 'q' seconds
    mtime_ns: array[int]  # 'I'
    size: array[int]  # 'Q', logical bytes of regular files, else 0
    extra: array[int]  # 'I': index in symlink_targets; kinds.device_number; else 0
    xattr_set: array[int]  # 'I': 0 for none, else 1 + index in xattr_sets
    # Shared.
    symlink_targets: list[bytes]
    xattr_sets: list[Xattrs]
    lower_links: list[bytes]  # target paths, in entry order
    whiteouts: list[bytes]  # sorted paths
    opaques: list[bytes]  # sorted paths of directories
    # Transient and derived.
    contents: array[int] = field(default_factory=lambda: array("q"))  # spool ids, -1 = none
    links: array[int] = field(default_factory=lambda: array("I"))  # names of each inode
    first_entry: array[int] = field(default_factory=lambda: array("I"))

    def __post_init__(self) -> None:
        count = len(self.mode)
        if len(self.contents) != count:
            self.contents = array("q", [-1]) * count
        self.links = array("I", bytes(4 * count))
        self.first_entry = array("I", bytes(4 * count))
        links, first = self.links, self.first_entry
        for entry, inode in enumerate(self.entry_inode):
            if inode < count:
                if not links[inode]:
                    first[inode] = entry
                links[inode] += 1

    @property
    def entry_count(self) -> int:
        """Names, the root included."""
        return len(self.entry_inode)

    @property
    def inode_count(self) -> int:
        """Files (of all kinds) that this layer itself describes."""
        return len(self.mode)

    def kind(self, inode: int) -> int:
        """The kind (`kinds.*`) of an inode."""
        return self.mode[inode] >> 12

    def name(self, entry: int) -> bytes:
        """The last component of an entry's path."""
        return self.names[self.name_ends[entry - 1] if entry else 0 : self.name_ends[entry]]

    def path(self, entry: int) -> bytes:
        """The full path of an entry."""
        parts: list[bytes] = []
        while entry:
            parts.append(self.name(entry))
            entry = self.entry_parent[entry]
        parts.reverse()
        return b"/".join(parts)

    def first_path(self, inode: int) -> bytes:
        """The bytewise first path that names an inode."""
        return self.path(self.first_entry[inode])

    def paths(self) -> Iterator[bytes]:
        """All paths in entry order."""
        directories: dict[int, bytes] = {0: b""}
        start = 0
        count = self.inode_count
        for entry, (parent, inode, end) in enumerate(
            zip(self.entry_parent, self.entry_inode, self.name_ends, strict=True)
        ):
            above = directories[parent]
            name = self.names[start:end]
            path = above + b"/" + name if above else name
            start = end
            if inode == IMPLICIT or (inode < count and self.mode[inode] >> 12 == kinds.DIRECTORY):
                directories[entry] = path
            yield path

    def find_entry(self, path: bytes) -> int | None:
        """The entry of a path, by bisection; None where this layer does not name it."""
        low, high = 0, self.entry_count
        while low < high:
            middle = (low + high) // 2
            if self.path(middle) < path:
                low = middle + 1
            else:
                high = middle
        return low if low < self.entry_count and self.path(low) == path else None

    def target(self, inode: int) -> bytes:
        """The target of a symlink inode."""
        return self.symlink_targets[self.extra[inode]]

    def xattrs(self, inode: int) -> Xattrs:
        """The extended attributes of an inode, sorted by name."""
        number = self.xattr_set[inode]
        return self.xattr_sets[number - 1] if number else ()

    def encode(self) -> bytes:
        """The canonical encoding (`tablecodec`), the same for equal tables everywhere."""
        from imagecache.flatten.tablecodec import encode_table  # noqa: PLC0415 - the codec imports this module

        return encode_table(self)

    @staticmethod
    def decode(encoded: bytes | memoryview, limits: Limits) -> FileTable:
        """The table of a canonical encoding; raises `Rejected` for anything else."""
        from imagecache.flatten.tablecodec import decode_table  # noqa: PLC0415 - the codec imports this module

        return decode_table(encoded, limits)


def region_layout(table: FileTable) -> RegionLayout:
    """Each non-empty regular file in file-table order, one after the other, block-aligned."""
    inodes = array("I")
    start_blocks = array("I")
    blocks = array("I")
    total = 0
    for inode, size in enumerate(table.size):
        if size:
            count = (size + BLOCK - 1) // BLOCK
            inodes.append(inode)
            start_blocks.append(total)
            blocks.append(count)
            total += count
    return RegionLayout(inodes, start_blocks, blocks, total)
