"""The EROFS face: the metadata region of a merged tree, in one call.

Format: Linux fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst (uncompressed, 4 KiB
blocks, no feature that kernel 5.4 lacks). Sections: head (superblock at 1024, root inode at 1152,
nid 36, since root_nid has 16 bits), one of inodes per layer, directories. Nid = byte offset / 32.
"""

from __future__ import annotations

import hashlib
import struct
from array import array

from imagecache.faces.crc32c import crc32c
from imagecache.faces.erofs_directories import (
    DirectorySection,
    DirectoryShape,
    directory_inode,
    entry_block,
)
from imagecache.faces.erofs_inodes import (
    BLOCK,
    DIRENT_TYPES,
    SLOT,
    Attributes,
    LayerSection,
    pack_xattrs,
)
from imagecache.faces.plan import MetadataRegion, plan_disk
from imagecache.flatten import kinds
from imagecache.flatten.filetable import region_layout
from imagecache.flatten.tree import Directory, Tree

_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
MAGIC = 0xE0F5E1E2
SUPERBLOCK_AT = 1024
ROOT_AT = SUPERBLOCK_AT + 128
CHECKSUM_FEATURE = 1
MTIME_FEATURE = 2
DIRECTORY_TYPE = DIRENT_TYPES[kinds.DIRECTORY]


class _Writer:
    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._nids = array("Q")
        self._types = bytearray()
        self._xattr_bodies: dict[tuple[int, int], bytes] = {}
        # Directories in tree order (parents first, names sorted): (directory, parent's order).
        self._directories: list[tuple[Directory, int]] = []
        stack = [(tree.root, 0)]
        while stack:
            directory, parent = stack.pop()
            order = len(self._directories)
            self._directories.append((directory, parent))
            below = sorted(
                (item for item in directory.children.items() if isinstance(item[1], Directory)),
                reverse=True,
            )
            stack.extend((child, order) for _, child in below if isinstance(child, Directory))

    def write(self) -> MetadataRegion:
        tree = self._tree
        tables = tree.tables
        layers = [
            LayerSection(
                table, tree.links[tree.bases[layer] : tree.bases[layer] + table.inode_count]
            )
            for layer, table in enumerate(tables)
        ]
        shapes = [DirectoryShape(item, self._body(item)) for item, _ in self._directories]
        attributes = [
            self._attributes(item, shape)
            for (item, _), shape in zip(self._directories, shapes, strict=True)
        ]
        root_core = 32 if attributes[0].is_compact() else 64
        root_is_inline = shapes[0].inline(root_core, BLOCK - ROOT_AT)
        head_size = ROOT_AT + root_core + len(shapes[0].body)
        head_blocks = -(-head_size // BLOCK)
        section = DirectorySection(shapes[0], root_is_inline=root_is_inline)
        for shape, item in zip(shapes[1:], attributes[1:], strict=True):
            section.add(shape, item)
        total = head_blocks + sum(layer.blocks for layer in layers) + section.blocks
        plan = plan_disk(total, [region_layout(table).total_blocks for table in tables])
        sections: list[bytes] = []
        start = head_blocks
        for layer, region_start in zip(layers, plan.layer_start_blocks, strict=True):
            sections.append(layer.write(start, region_start))
            first = start * BLOCK // SLOT
            self._nids.extend(first + offset // SLOT for offset in layer.offsets)
            start += layer.blocks
        for table in tables:
            self._types += bytes(DIRENT_TYPES[mode >> 12] for mode in table.mode)
        root, directories = self._write_directories(section, shapes, attributes, start)
        live = sum(map(bool, tree.links)) + sum(item.inode < 0 for item, _ in self._directories)
        head = bytearray(head_blocks * BLOCK)
        head[ROOT_AT : ROOT_AT + len(root)] = root
        _write_superblock(head, [*sections, directories], live, plan.disk_blocks)
        return MetadataRegion((bytes(head), *sections, directories), total, plan)

    def _body(self, directory: Directory) -> bytes:
        if directory.inode < 0:
            return b""
        layer, inode = self._tree.owner(directory.inode)
        table = self._tree.tables[layer]
        number = table.xattr_set[inode]
        if not number:
            return b""
        body = self._xattr_bodies.get((layer, number))
        if body is None:
            body = pack_xattrs(table.xattr_sets[number - 1], "a directory")
            self._xattr_bodies[layer, number] = body
        return body

    def _attributes(self, directory: Directory, shape: DirectoryShape) -> Attributes:
        links = 2 + shape.subdirectories
        if directory.inode < 0:
            return Attributes(0o40755, 0, 0, 0, 0, links, shape.size)
        layer, inode = self._tree.owner(directory.inode)
        table = self._tree.tables[layer]
        return Attributes(
            table.mode[inode],
            table.uid[inode],
            table.gid[inode],
            table.mtime[inode],
            table.mtime_ns[inode],
            links,
            shape.size,
        )

    def _write_directories(
        self,
        section: DirectorySection,
        shapes: list[DirectoryShape],
        attributes: list[Attributes],
        start: int,
    ) -> tuple[bytes, bytes]:
        """(root inode with what follows it inline, directory section)."""
        writer = section.begin(start)
        first_nid = start * BLOCK // SLOT
        nids = [ROOT_AT // SLOT]
        nids.extend(first_nid + shape.offset // SLOT for shape in shapes[1:])
        number_of = {item: order for order, (item, _) in enumerate(self._directories)}
        leaf_nids, leaf_types = self._nids, self._types
        root_first = (shapes[0], section.root_is_inline, 0)
        root = b""
        for order, (shape, inline, first) in enumerate([root_first, *section.shapes()]):
            directory, parent = self._directories[order]
            children = directory.children
            special = {
                b".": (nids[order], DIRECTORY_TYPE),
                b"..": (nids[parent], DIRECTORY_TYPE),
            }

            def resolve(
                name: bytes,
                children: dict[bytes, Directory | int] = children,
                special: dict[bytes, tuple[int, int]] = special,
            ) -> tuple[int, int]:
                child = children.get(name)
                if child is None:
                    return special[name]
                if isinstance(child, int):
                    return leaf_nids[child], leaf_types[child]
                return nids[number_of[child]], DIRECTORY_TYPE

            blocks = [entry_block(names, resolve) for names in shape.names]
            tail = blocks.pop() if inline else None
            writer.put_blocks(first, blocks)
            inode = directory_inode(
                shape,
                attributes[order],
                address=writer.address(first) if blocks else 0,
                number=order + 1,
                tail=tail,
            )
            if order:
                writer.put_inode(shape.offset, inode)
            else:
                root = inode
        return root, writer.finish()


def _write_superblock(head: bytearray, rest: list[bytes], inodes: int, disk_blocks: int) -> None:
    """Fill in the superblock; the uuid is made from all other bytes, the checksum comes last."""

    def pack(checksum: int, uuid: bytes) -> None:
        _SUPERBLOCK.pack_into(
            head,
            SUPERBLOCK_AT,
            MAGIC,
            checksum,
            CHECKSUM_FEATURE | MTIME_FEATURE,
            12,  # log2 of the block size
            0,
            ROOT_AT // SLOT,
            inodes,
            0,  # build time: compact inodes are those modified at the epoch
            0,
            disk_blocks,
            0,
            0,
            uuid,
            b"",
            0,
        )

    pack(0, bytes(16))
    digest = hashlib.sha256(b"cubecache erofs 1\0" + head)
    for section in rest:
        digest.update(section)
    uuid = bytearray(digest.digest()[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80  # RFC 9562 version 8, variant 10
    uuid[8] = uuid[8] & 0x3F | 0x80
    pack(0, bytes(uuid))
    pack(crc32c(bytes(head[SUPERBLOCK_AT:BLOCK])), bytes(uuid))


def write_erofs(tree: Tree) -> MetadataRegion:
    """The metadata region of a tree and the plan of its disk; equal trees give equal bytes.

    Raises `LimitExceeded` for what EROFS cannot hold.
    """
    return _Writer(tree).write()
