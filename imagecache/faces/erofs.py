"""The EROFS face: the metadata region of a merged tree, in one call.

Format: Linux fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst (uncompressed, 4 KiB
blocks, no feature that kernel 5.4 lacks). Sections: head (superblock at 1024, root inode at 1152,
nid 36, since root_nid has 16 bits), one of inodes per layer, directories (each layer's own, then
those that layers share). Parts are padded so that a little growth moves nothing behind them, and a
directory that becomes shared leaves its place empty. Nid = byte offset / 32.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from dataclasses import dataclass

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
from imagecache.flatten.filetable import IMPLICIT, FileTable, region_layout
from imagecache.flatten.tree import Directory, Tree

_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sI44x")
MAGIC = 0xE0F5E1E2
SUPERBLOCK_AT = 1024
ROOT_AT = SUPERBLOCK_AT + 128
CHECKSUM_FEATURE = 1
MTIME_FEATURE = 2
DIRECTORY_TYPE = DIRENT_TYPES[kinds.DIRECTORY]


SHARED = 1 << 32


def _group(directory: Directory) -> int:
    """The layer whose own a directory is; SHARED + the first other one that changed it."""
    return directory.made if directory.shared < 0 else SHARED + directory.shared


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory's turn in the section: its own, or (`left`) that which it left when shared."""

    group: int
    directory: Directory
    parent: Directory
    left: bool


def _places(tree: Tree) -> list[_Place]:
    """The root, then each layer's own directories, then the shared ones by the layer that
    came to share them; groups in tree order.

    So an upper layer moves no directory of the layers below but those it shares with them.
    """
    places: list[_Place] = []
    stack = [(tree.root, tree.root)]
    while stack:
        directory, parent = stack.pop()
        group = -1 if directory is tree.root else _group(directory)
        places.append(_Place(group, directory, parent, left=False))
        if group >= SHARED:
            places.append(_Place(directory.made, directory, parent, left=True))
        below = sorted(
            (item for item in directory.children.items() if isinstance(item[1], Directory)),
            reverse=True,
        )
        stack.extend((child, directory) for _, child in below if isinstance(child, Directory))
    places.sort(key=_group_of)
    return places


def _group_of(place: _Place) -> int:
    return place.group


def _names_when_made(table: FileTable, entries: set[int]) -> dict[int, list[bytes]]:
    """The names that a layer itself has in each of these directory entries of its table."""
    names: dict[int, list[bytes]] = {entry: [] for entry in entries}
    for entry, parent in enumerate(table.entry_parent):
        if parent in entries and entry:
            names[parent].append(table.name(entry))
    return names


class _Writer:
    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._nids = array("Q")
        self._types = bytearray()
        self._xattr_bodies: dict[tuple[int, int], bytes] = {}
        self._places = _places(tree)
        real = [place for place in self._places if not place.left]
        order_of = {place.directory: order for order, place in enumerate(real)}
        # (directory, its parent's place in this list), the root first.
        self._directories = [(place.directory, order_of[place.parent]) for place in real]

    def write(self) -> MetadataRegion:
        tree = self._tree
        tables = tree.tables
        layers = [
            LayerSection(
                table, tree.links[tree.bases[layer] : tree.bases[layer] + table.inode_count]
            )
            for layer, table in enumerate(tables)
        ]
        shapes = [
            DirectoryShape(item.children, self._body(item.inode)) for item, _ in self._directories
        ]
        attributes = [
            self._attributes(item.inode, _links(item), shape.size)
            for (item, _), shape in zip(self._directories, shapes, strict=True)
        ]
        root_core = 32 if attributes[0].is_compact() else 64
        root_is_inline = shapes[0].inline(root_core, BLOCK - ROOT_AT)
        head_size = ROOT_AT + root_core + len(shapes[0].body)
        head_blocks = -(-head_size // BLOCK)
        section = DirectorySection(shapes[0], root_is_inline=root_is_inline)
        self._place_directories(section, shapes, attributes)
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

    def _place_directories(
        self, section: DirectorySection, shapes: list[DirectoryShape], attributes: list[Attributes]
    ) -> None:
        tables = self._tree.tables
        left: list[set[int]] = [set() for _ in tables]
        for place in self._places:
            if place.left:
                left[place.directory.made].add(place.directory.entry)
        names = [_names_when_made(table, left[layer]) for layer, table in enumerate(tables)]
        group = 0
        order = 0
        for place in self._places[1:]:
            if place.group != group:
                group = place.group
                section.begin_group()
            if not place.left:
                order += 1
                section.add(shapes[order], attributes[order], roomy=group >= SHARED)
                continue
            made, entry = place.directory.made, place.directory.entry
            inode = tables[made].entry_inode[entry]
            number = -1 if inode == IMPLICIT else self._tree.bases[made] + inode
            shape = DirectoryShape(names[made][entry], self._body(number))
            section.leave_out(shape, self._attributes(number, 2, shape.size))

    def _body(self, number: int) -> bytes:
        """The packed xattrs of a directory's (global) inode; -1 has none."""
        if number < 0:
            return b""
        layer, inode = self._tree.owner(number)
        table = self._tree.tables[layer]
        numbered = table.xattr_set[inode]
        if not numbered:
            return b""
        body = self._xattr_bodies.get((layer, numbered))
        if body is None:
            body = pack_xattrs(table.xattr_sets[numbered - 1], "a directory")
            self._xattr_bodies[layer, numbered] = body
        return body

    def _attributes(self, number: int, links: int, size: int) -> Attributes:
        if number < 0:
            return Attributes(0o40755, 0, 0, 0, 0, links, size)
        layer, inode = self._tree.owner(number)
        table = self._tree.tables[layer]
        return Attributes(
            table.mode[inode],
            table.uid[inode],
            table.gid[inode],
            table.mtime[inode],
            table.mtime_ns[inode],
            links,
            size,
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
                number=shape.offset // SLOT + 1,
                tail=tail,
            )
            if order:
                writer.put_inode(shape.offset, inode)
            else:
                root = inode
        return root, writer.finish()


def _links(directory: Directory) -> int:
    return 2 + sum(isinstance(child, Directory) for child in directory.children.values())


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
