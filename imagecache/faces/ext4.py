"""The ext4 face: metadata of a merged tree over the same data regions, read-only or writable.

Format: Linux fs/ext4, Documentation/filesystems/ext4. All metadata stands packed in the window;
blocks of dead data, of gaps and behind the regions are free in the bitmaps, so that a guest may
write to (an overlay of) the disk. No journal, no checksums of metadata. Inode numbers: 2 the root,
11 lost+found, then each layer's files from a block of their own (dead ones leave free slots), then
directories. Sections: head (superblock to the first table block), inodes per layer, the rest.
"""

from __future__ import annotations

from array import array

from imagecache.errors import LimitExceeded
from imagecache.faces.ext4_blocks import LayerXattrs, TableBlocks
from imagecache.faces.ext4_directories import EMPTY_BLOCK, DirectoryShape
from imagecache.faces.ext4_geometry import GROUP_BLOCKS, Geometry, find_geometry
from imagecache.faces.ext4_groups import pack_head, set_bits
from imagecache.faces.ext4_inodes import (
    BLOCK,
    EXTENTS_FLAG,
    INDEX_FLAG,
    INODE_SIZE,
    INODES_PER_BLOCK,
    MAX_LINKS,
    InodeFields,
    device_body,
    extent_block_count,
    extent_root,
    is_slow_symlink,
    pack_inode,
)
from imagecache.faces.plan import MetadataRegion
from imagecache.flatten import kinds
from imagecache.flatten.filetable import region_layout
from imagecache.flatten.kinds import shown
from imagecache.flatten.tree import Directory, Tree

ROOT_INODE = 2
LOST_FOUND_INODE = 11
FIRST_LAYER_INODE = INODES_PER_BLOCK + 1
LOST_FOUND = b"lost+found"
LOST_FOUND_BLOCKS = 4
# ext4's file types in directory entries, by kind
DIRENT_TYPES = {
    kinds.REGULAR: 1,
    kinds.DIRECTORY: 2,
    kinds.CHARACTER: 3,
    kinds.BLOCK_DEVICE: 4,
    kinds.FIFO: 5,
    kinds.SOCKET: 6,
    kinds.SYMLINK: 7,
}


class _Writer:
    def __init__(self, tree: Tree, free_blocks: int) -> None:
        self._tree = tree
        self._free_blocks = free_blocks
        self._xattrs = [LayerXattrs(table) for table in tree.tables]
        self._layouts = [region_layout(table) for table in tree.tables]
        self._numbers = array("I", bytes(4 * len(tree.links)))  # ext4 inode of each global inode
        self._layer_first: list[int] = []
        following = FIRST_LAYER_INODE
        for layer, table in enumerate(tree.tables):
            self._layer_first.append(following)
            base = tree.bases[layer]
            for inode, mode in enumerate(table.mode):
                if mode >> 12 != kinds.DIRECTORY:
                    self._numbers[base + inode] = following
                    following += 1
            following += -(following - 1) % INODES_PER_BLOCK
        self._first_directory = following
        # Directories in tree order: (directory, parent's order, path for messages).
        self._directories: list[tuple[Directory, int, bytes]] = []
        stack = [(tree.root, 0, b"")]
        while stack:
            directory, parent, path = stack.pop()
            order = len(self._directories)
            self._directories.append((directory, parent, path))
            prefix = path + b"/" if path else b""
            stack.extend(
                (child, order, prefix + name)
                for name, child in sorted(directory.children.items(), reverse=True)
                if isinstance(child, Directory)
            )
        self._own_lost_found = LOST_FOUND not in tree.root.children
        self._shapes = [self._shape(directory, path) for directory, _, path in self._directories]
        self._directory_numbers = [
            ROOT_INODE if order == 0 else following + order - 1
            for order in range(len(self._directories))
        ]
        self._inodes = following - 1 + len(self._directories) - 1

    def _shape(self, directory: Directory, path: bytes) -> DirectoryShape:
        names = list(directory.children)
        if not path and self._own_lost_found:
            names.append(LOST_FOUND)
        return DirectoryShape(names, path)

    def write(self) -> MetadataRegion:
        others = self._count_others()
        spare = self._free_blocks // 4
        geometry = find_geometry(
            self._inodes + spare,
            others,
            [layout.total_blocks for layout in self._layouts],
            self._free_blocks,
        )
        blocks = TableBlocks(geometry.others)
        layers = [
            self._layer_inodes(layer, start, blocks)
            for layer, start in enumerate(geometry.plan.layer_start_blocks)
        ]
        first, rest = self._directory_inodes(blocks)
        if len(blocks) != others:
            raise AssertionError("ext4: the two passes over the tree differ")
        used_tables = 1 + (sum(map(len, layers)) + len(rest)) // BLOCK
        rest += bytes((geometry.table_blocks - used_tables) * BLOCK)
        rest += blocks.join()
        metadata = geometry.others + others
        used_blocks, used_inodes = self._used(geometry, metadata)
        directories = [*self._directory_numbers, *([LOST_FOUND_INODE] * self._own_lost_found)]
        head = pack_head(
            geometry,
            used_blocks,
            used_inodes,
            directory_numbers=directories,
            first_table=first,
            rest=[*layers, rest],
        )
        return MetadataRegion((head, *layers, rest), metadata, geometry.plan)

    # Pass one ---------------------------------------------------------------------------------

    def _count_others(self) -> int:
        """Blocks behind the inode tables: long symlinks, extents, attributes, directories."""
        tree = self._tree
        count = LOST_FOUND_BLOCKS if self._own_lost_found else 0
        for layer, table in enumerate(tree.tables):
            base = tree.bases[layer]
            xattrs = self._xattrs[layer]
            for inode, mode in enumerate(table.mode):
                kind = mode >> 12
                if kind == kinds.DIRECTORY or not tree.links[base + inode]:
                    continue
                if table.xattr_set[inode]:
                    count += xattrs.expect(inode)
                if kind == kinds.SYMLINK:
                    count += is_slow_symlink(kind, len(table.target(inode)))
                elif table.size[inode] > BLOCK * GROUP_BLOCKS:
                    count += extent_block_count(-(-table.size[inode] // BLOCK))
        for (directory, _, _), shape in zip(self._directories, self._shapes, strict=True):
            if directory.inode >= 0:
                layer, inode = tree.owner(directory.inode)
                count += self._xattrs[layer].expect(inode)
            count += shape.blocks + extent_block_count(shape.blocks)
        return count

    # Pass two ---------------------------------------------------------------------------------

    def _layer_inodes(self, layer: int, region_start: int, blocks: TableBlocks) -> bytes:
        tree = self._tree
        table = tree.tables[layer]
        base = tree.bases[layer]
        layout = self._layouts[layer]
        address = dict(zip(layout.inodes, layout.start_blocks, strict=True))
        xattrs = self._xattrs[layer]
        records: list[bytes] = []
        empty_file = extent_root(0, 0, blocks.add)
        for inode, mode in enumerate(table.mode):
            kind = mode >> 12
            if kind == kinds.DIRECTORY:
                continue
            links = tree.links[base + inode]
            if not links:
                records.append(bytes(INODE_SIZE))
                continue
            if links > MAX_LINKS:
                raise LimitExceeded(
                    f"{shown(table.first_path(inode))} has {links} names, over ext4's {MAX_LINKS}",
                    remedy="use --fs erofs",
                )
            in_inode, xattr_block = b"", 0
            if table.xattr_set[inode]:
                in_inode, xattr_block = xattrs.place(inode, blocks)
            size = table.size[inode]
            used = int(xattr_block > 0)
            flags = 0
            body = b""
            if kind == kinds.REGULAR:
                flags = EXTENTS_FLAG
                body = empty_file
                if size:
                    count = -(-size // BLOCK)
                    before = len(blocks)
                    body = extent_root(region_start + address[inode], count, blocks.add)
                    used += count + len(blocks) - before
            elif kind == kinds.SYMLINK:
                body = table.target(inode)
                size = len(body)
                if is_slow_symlink(kind, size):
                    flags = EXTENTS_FLAG
                    body = extent_root(blocks.add(body), 1, blocks.add)
                    used += 1
            elif kind in kinds.DEVICES:
                body = device_body(table.extra[inode])
            records.append(
                pack_inode(
                    InodeFields(
                        mode,
                        table.uid[inode],
                        table.gid[inode],
                        table.mtime[inode],
                        table.mtime_ns[inode],
                        links,
                        size,
                        used,
                        flags,
                        body,
                        xattr_block,
                        in_inode,
                    )
                )
            )
        section = b"".join(records)
        return section + bytes(-len(section) % BLOCK)

    def _directory_inodes(self, blocks: TableBlocks) -> tuple[bytes, bytes]:
        """(the first table block with root and lost+found, blocks of the other directories)."""
        tree = self._tree
        numbers = self._directory_numbers
        number_of = {item: numbers[order] for order, (item, _, _) in enumerate(self._directories)}
        types = bytearray()
        for table in tree.tables:
            types += bytes(DIRENT_TYPES[mode >> 12] for mode in table.mode)
        first = bytearray(BLOCK)
        records: list[bytes] = []
        for order, (directory, parent, _) in enumerate(self._directories):
            shape = self._shapes[order]
            children = directory.children
            subdirectories = sum(isinstance(child, Directory) for child in children.values())
            links = 2 + subdirectories + (order == 0 and self._own_lost_found)
            used = shape.blocks
            mode, uid, gid, mtime, mtime_ns = 0o40755, 0, 0, 0, 0
            in_inode, xattr_block = b"", 0
            if directory.inode >= 0:
                layer, inode = tree.owner(directory.inode)
                table = tree.tables[layer]
                mode, uid, gid = table.mode[inode], table.uid[inode], table.gid[inode]
                mtime, mtime_ns = table.mtime[inode], table.mtime_ns[inode]
                in_inode, xattr_block = self._xattrs[layer].place(inode, blocks)

            def resolve(
                name: bytes, children: dict[bytes, Directory | int] = children
            ) -> tuple[int, int]:
                child = children.get(name)
                if child is None:  # only ours is not among the tree's names
                    return LOST_FOUND_INODE, DIRENT_TYPES[kinds.DIRECTORY]
                if isinstance(child, int):
                    return self._numbers[child], types[child]
                return number_of[child], DIRENT_TYPES[kinds.DIRECTORY]

            start = blocks.add_all(shape.write(numbers[order], numbers[parent], resolve))
            before = len(blocks)
            body = extent_root(start, shape.blocks, blocks.add)
            used += len(blocks) - before + (xattr_block > 0)
            record = pack_inode(
                InodeFields(
                    mode,
                    uid,
                    gid,
                    mtime,
                    mtime_ns,
                    links if links <= MAX_LINKS else 1,  # dir_nlink: 1 means "many"
                    shape.blocks * BLOCK,
                    used,
                    EXTENTS_FLAG | (INDEX_FLAG if shape.is_indexed else 0),
                    body,
                    xattr_block,
                    in_inode,
                )
            )
            if order:
                records.append(record)
            else:
                first[(ROOT_INODE - 1) * INODE_SIZE : ROOT_INODE * INODE_SIZE] = record
        if self._own_lost_found:
            self._put_lost_found(first, blocks)
        rest = b"".join(records)
        return bytes(first), rest + bytes(-len(rest) % BLOCK)

    def _put_lost_found(self, first: bytearray, blocks: TableBlocks) -> None:
        shape = DirectoryShape([], LOST_FOUND)
        entries = shape.write(LOST_FOUND_INODE, ROOT_INODE, lambda _: (0, 0))
        start = blocks.add_all(entries + [EMPTY_BLOCK] * (LOST_FOUND_BLOCKS - 1))
        record = pack_inode(
            InodeFields(
                0o40700,
                0,
                0,
                0,
                0,
                2,
                LOST_FOUND_BLOCKS * BLOCK,
                LOST_FOUND_BLOCKS,
                EXTENTS_FLAG,
                extent_root(start, LOST_FOUND_BLOCKS, blocks.add),
            )
        )
        at = (LOST_FOUND_INODE - 1) * INODE_SIZE
        first[at : at + INODE_SIZE] = record

    # Bitmaps ----------------------------------------------------------------------------------

    def _used(self, geometry: Geometry, metadata: int) -> tuple[bytearray, bytearray]:
        """Bitmaps of all blocks and inodes in use, padded with ones to whole groups."""
        tree = self._tree
        disk = geometry.plan.disk_blocks
        blocks = bytearray(geometry.groups * GROUP_BLOCKS // 8)
        set_bits(blocks, 0, metadata)
        set_bits(blocks, disk, geometry.groups * GROUP_BLOCKS - disk)
        for layer, start in enumerate(geometry.plan.layer_start_blocks):
            layout = self._layouts[layer]
            base = tree.bases[layer]
            run_start = run_end = 0
            for inode, at, count in zip(
                layout.inodes, layout.start_blocks, layout.blocks, strict=True
            ):
                if not tree.links[base + inode]:
                    continue
                if at != run_end:
                    set_bits(blocks, start + run_start, run_end - run_start)
                    run_start = at
                run_end = at + count
            set_bits(blocks, start + run_start, run_end - run_start)
        inodes = bytearray(geometry.groups * BLOCK)
        per_group = geometry.inodes_per_group

        def use(first: int, count: int) -> None:
            """Mark inodes from number `first`, each group's bits in a block of their own."""
            index = first - 1
            while count > 0:
                group, bit = divmod(index, per_group)
                part = min(count, per_group - bit)
                set_bits(inodes, group * GROUP_BLOCKS + bit, part)
                index += part
                count -= part

        use(1, LOST_FOUND_INODE if self._own_lost_found else LOST_FOUND_INODE - 1)
        for number, links in zip(self._numbers, tree.links, strict=True):
            if number and links:
                use(number, 1)
        use(self._first_directory, len(self._directories) - 1)
        for group in range(geometry.groups):
            set_bits(inodes, group * GROUP_BLOCKS + per_group, GROUP_BLOCKS - per_group)
        return blocks, inodes


def write_ext4(tree: Tree, *, free_blocks: int = 0) -> MetadataRegion:
    """The ext4 metadata region of a tree; equal trees and options give equal bytes.

    `free_blocks` (of 4096 bytes) are added behind the data for a guest to write to, with an inode
    for each 16 KiB; gaps and hidden data are free as well. Raises `LimitExceeded`, naming the file,
    for what ext4 cannot hold: attributes over a block, over 65,000 names of a file.
    """
    return _Writer(tree, free_blocks).write()
