"""The merge of layers' file tables: the tree that a container sees, and who is alive in it.

Per layer, in order: its links to lower files are found in the tree below; its whiteouts and opaque
directories act on that tree, by path and never through a symlink; then its entries are laid over
it. A directory over a directory keeps the children; an implicit one also keeps the attributes.
Anything else replaces what stood there. So overlayfs shows separately unpacked layers.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imagecache.errors import Rejected
from imagecache.flatten import kinds
from imagecache.flatten.filetable import IMPLICIT, FileTable
from imagecache.flatten.kinds import shown

SYMLINK_HOPS = 40


class Directory:
    """A merged directory: children by name are directories or global inode numbers.

    `inode` is the global number of the inode whose attributes it has, or -1: 0755 root:root,
    modified at the epoch (no tar entry described it). `made` is the layer that made it, as
    its table's entry `entry`; `shared` is the first other layer that changed its names or
    attributes, or -1.
    """

    __slots__ = ("children", "entry", "inode", "made", "shared")

    def __init__(self, layer: int, entry: int) -> None:
        self.children: dict[bytes, Directory | int] = {}
        self.inode = -1
        self.made = layer
        self.entry = entry
        self.shared = -1

    def touch(self, layer: int) -> None:
        """Note that a layer changed it."""
        if self.shared < 0 and layer != self.made:
            self.shared = layer


@dataclass(frozen=True, slots=True)
class Node:
    """What stands at a path: its kind, and its layer and inode there (-1, -1 if implicit)."""

    kind: int
    layer: int
    inode: int
    directory: Directory | None  # for directories


@dataclass(slots=True)
class Tree:
    """The merged tree. Global inode numbers count through the layers' inodes from the bottom."""

    tables: tuple[FileTable, ...]
    bases: array[int]  # 'I': first global number of each layer
    root: Directory
    links: array[int]  # 'I' per global inode: names in the tree; 0 = dead (directories: 0 or 1)

    def owner(self, number: int) -> tuple[int, int]:
        """(layer, inode in its table) of a global inode number."""
        layer = bisect_right(self.bases, number) - 1
        return layer, number - self.bases[layer]

    def is_live(self, layer: int, inode: int) -> bool:
        """Whether any path leads to this inode of this layer's table."""
        return self.links[self.bases[layer] + inode] > 0

    def lookup(self, path: bytes) -> Node | None:
        """What stands at a path (no leading slash; symlinks are not followed), or None."""
        here: Directory | int = self.root
        if path:
            for part in path.split(b"/"):
                if not isinstance(here, Directory):
                    return None
                child = here.children.get(part)
                if child is None:
                    return None
                here = child
        return self._node(here)

    def _node(self, child: Directory | int) -> Node:
        if isinstance(child, Directory):
            layer, inode = self.owner(child.inode) if child.inode >= 0 else (-1, -1)
            return Node(kinds.DIRECTORY, layer, inode, child)
        layer, inode = self.owner(child)
        return Node(self.tables[layer].kind(inode), layer, inode, None)

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every (path, node), the root first, each directory's names in bytewise order."""
        stack: list[tuple[bytes, Directory | int]] = [(b"", self.root)]
        while stack:
            path, child = stack.pop()
            yield path, self._node(child)
            if isinstance(child, Directory):
                prefix = path + b"/" if path else b""
                for name in sorted(child.children, reverse=True):
                    stack.append((prefix + name, child.children[name]))


def merge(tables: Sequence[FileTable]) -> Tree:
    """The tree of layers given from the bottom up; an image of no layers has an empty root.

    Raises `Rejected` where a layer links to a lower file that is not there.
    """
    bases = array("I")
    total = 0
    root = Directory(0, 0)
    for layer, table in enumerate(tables):
        bases.append(total)
        _apply(root, table, tables, bases, layer)
        total += table.inode_count
    links = array("I", bytes(4 * total))
    stack = [root]
    while stack:
        here = stack.pop()
        if here.inode >= 0:
            links[here.inode] = 1
        for child in here.children.values():
            if isinstance(child, Directory):
                stack.append(child)
            else:
                links[child] += 1
    return Tree(tuple(tables), bases, root, links)


def _apply(
    root: Directory,
    table: FileTable,
    tables: Sequence[FileTable],
    bases: array[int],
    layer: int,
) -> None:
    lower = [_lower_inode(root, path, tables, bases, layer) for path in table.lower_links]
    for path in table.whiteouts:
        parent_path, _, name = path.rpartition(b"/")
        directory = _directory_at(root, parent_path)
        if directory is not None and directory.children.pop(name, None) is not None:
            directory.touch(layer)
    for path in table.opaques:
        directory = _directory_at(root, path)
        if directory is not None and directory.children:
            directory.children.clear()
            directory.touch(layer)
    count = table.inode_count
    base = bases[layer]
    mode = table.mode
    names = table.names
    directories: dict[int, Directory] = {}
    start = 0
    for entry, (parent, inode, end) in enumerate(
        zip(table.entry_parent, table.entry_inode, table.name_ends, strict=True)
    ):
        name = names[start:end]
        start = end
        if inode < count and mode[inode] >> 12 != kinds.DIRECTORY:
            above = directories[parent]
            above.children[name] = base + inode
            if above.made != layer:
                above.touch(layer)
        elif inode != IMPLICIT and inode >= count:
            above = directories[parent]
            above.children[name] = lower[inode - count]
            if above.made != layer:
                above.touch(layer)
        else:
            if entry:
                above = directories[parent]
                found = above.children.get(name)
                if isinstance(found, Directory):
                    here = found
                else:
                    here = above.children[name] = Directory(layer, entry)
                    above.touch(layer)
            else:
                here = root
            if inode != IMPLICIT:
                here.inode = base + inode
                here.touch(layer)
            directories[entry] = here


def _directory_at(root: Directory, path: bytes) -> Directory | None:
    here = root
    if path:
        for part in path.split(b"/"):
            child = here.children.get(part)
            if not isinstance(child, Directory):
                return None
            here = child
    return here


def _lower_inode(
    root: Directory,
    path: bytes,
    tables: Sequence[FileTable],
    bases: array[int],
    layer: int,
) -> int:
    """The global inode that a hard link's target path names below; parents follow symlinks."""
    stack = [root]
    ahead = path.split(b"/")[::-1]
    hops = 0
    while True:
        part = ahead.pop()
        if part == b"..":
            if len(stack) > 1:
                stack.pop()
            child: Directory | int | None = stack[-1]
        elif part in (b"", b"."):
            child = stack[-1]
        else:
            child = stack[-1].children.get(part)
        if child is None:
            break
        if isinstance(child, Directory):
            if not ahead:
                break
            if child is not stack[-1]:
                stack.append(child)
            continue
        if not ahead:
            return child
        owner = bisect_right(bases, child) - 1
        table = tables[owner]
        inode = child - bases[owner]
        hops += 1
        if table.kind(inode) != kinds.SYMLINK or hops > SYMLINK_HOPS:
            break
        target = table.target(inode)
        if target.startswith(b"/"):
            del stack[1:]
        ahead.extend(reversed(target.split(b"/")))
    raise Rejected(
        f"layer {layer} has a hard link to {shown(path)}, which is no file of the layers below",
        remedy="the image is broken: build it again",
    )
