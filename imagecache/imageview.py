"""A block image seen as files: path -> disk -> chunks, and disk offset -> path. Pure.

It joins a block manifest with its layers' file tables. Paths are bytes without a leading slash;
offsets are bytes of the disk.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from imagecache.blockimage.manifest import BlockManifest
from imagecache.chunks import BLOCK
from imagecache.errors import NotFound
from imagecache.flatten import kinds
from imagecache.flatten.filetable import FileTable, region_layout
from imagecache.flatten.tree import Node, Tree, merge

SYMLINK_HOPS = 40


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Where a regular file's content lies on the disk; sizes in bytes."""

    path: bytes
    layer: int
    offset: int
    size: int

    @property
    def blocks(self) -> range:
        """The disk blocks of the content."""
        return range(self.offset // BLOCK, -(-(self.offset + self.size) // BLOCK))


class ImageView:
    """One image's files on its disk."""

    def __init__(self, manifest: BlockManifest, tables: Sequence[FileTable]) -> None:
        self.manifest = manifest
        self.tables = tuple(tables)
        self._layouts = [region_layout(table) for table in tables]

    @cached_property
    def tree(self) -> Tree:
        """The merged tree."""
        return merge(self.tables)

    @cached_property
    def _starts(self) -> list[array[int]]:
        """By layer and inode: the first block of the content in its region."""
        found = []
        for table, layout in zip(self.tables, self._layouts, strict=True):
            starts = array("Q", bytes(8 * table.inode_count))
            for inode, start in zip(layout.inodes, layout.start_blocks, strict=True):
                starts[inode] = start
            found.append(starts)
        return found

    def resolve(self, path: bytes) -> tuple[bytes, Node]:
        """What stands at a path, symlinks followed inside the image; NotFound."""
        waiting = [part for part in path.split(b"/") if part][::-1]
        here: list[bytes] = []
        hops = 0
        node = self.tree.lookup(b"")
        while waiting:
            part = waiting.pop()
            if part == b".":
                continue
            if part == b"..":
                here = here[:-1]
                node = self.tree.lookup(b"/".join(here))
                continue
            node = self.tree.lookup(b"/".join([*here, part]))
            if node is None:
                break
            if node.kind != kinds.SYMLINK:
                here.append(part)
                continue
            hops += 1
            if hops > SYMLINK_HOPS:
                raise NotFound(f"{kinds.shown(path)} goes through too many symlinks")
            target = self.tables[node.layer].target(node.inode)
            if target.startswith(b"/"):
                here = []
            waiting += [step for step in target.split(b"/") if step][::-1]
            node = self.tree.lookup(b"/".join(here))
        if node is None:
            raise NotFound(f"{kinds.shown(path)} is not in the image")
        return b"/".join(here), node

    def span(self, path: bytes, node: Node) -> FileSpan:
        """Where a regular file's content lies."""
        start = self.manifest.layers[node.layer].start_block
        start += self._starts[node.layer][node.inode]
        return FileSpan(path, node.layer, start * BLOCK, self.tables[node.layer].size[node.inode])

    def files(self) -> Iterator[FileSpan]:
        """Every regular file of the tree by path; a hard-linked one under each of its names."""
        for path, node in self.tree.walk():
            if node.kind == kinds.REGULAR:
                yield self.span(path, node)

    def chunks_of(self, span: FileSpan) -> list[int]:
        """The chunks behind a file's content, in order, each once."""
        if not span.size:
            return []
        extents = self.manifest.extents
        touched = extents.overlapping(span.blocks.start, span.blocks.stop)
        return list(dict.fromkeys(extents.ordinals[n] for n in touched))

    def path_at(self, offset: int) -> tuple[bytes, int] | None:
        """The file that a disk offset lies in, and the offset in it; None for metadata and gaps."""
        block = offset // BLOCK
        layers = self.manifest.layers
        layer = bisect_right(layers, block, key=lambda placed: placed.start_block) - 1
        if layer < 0:
            return None
        inside = block - layers[layer].start_block
        layout = self._layouts[layer]
        ordinal = layout.find(inside)
        if ordinal is None:
            return None
        path = self.tables[layer].first_path(layout.inodes[ordinal])
        return path, offset - (layers[layer].start_block + layout.start_blocks[ordinal]) * BLOCK

    def file_blocks(self, layer: int, region_block: int) -> int:
        """The blocks of the file that a block of a layer's region belongs to; 0 for none."""
        layout = self._layouts[layer]
        ordinal = layout.find(region_block)
        return 0 if ordinal is None else layout.blocks[ordinal]
