"""Sizes of an ext4 disk: groups, with all bitmaps and inode tables packed in front.

Format: Linux fs/ext4/ext4.h; Documentation/filesystems/ext4. flex_bg lets bitmaps and tables stand
anywhere; sparse_super2 without backups leaves every later block to data.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imagecache.errors import LimitExceeded
from imagecache.faces.ext4_directories import HALF_MD4, HASH_SEED
from imagecache.faces.ext4_inodes import BLOCK, INODE_SIZE, INODES_PER_BLOCK
from imagecache.faces.plan import MAX_DISK_BLOCKS, DiskPlan, plan_disk

GROUP_BLOCKS = 32768
MAX_INODES_PER_GROUP = 32768
DESCRIPTOR = struct.Struct("<IIIHHHHIHHHH")

COMPAT = 0x8 | 0x20 | 0x200  # ext_attr, dir_index, sparse_super2
INCOMPAT = 0x2 | 0x40 | 0x200  # filetype, extents, flex_bg
RO_COMPAT = 0x1 | 0x2 | 0x8 | 0x20 | 0x40  # sparse_super, large_file, huge_file, dir_nlink, extra


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where an ext4 disk's structures stand, in blocks."""

    plan: DiskPlan
    groups: int
    inodes_per_group: int
    descriptor_blocks: int

    @property
    def block_bitmaps(self) -> int:
        """First block bitmap; one block each."""
        return 1 + self.descriptor_blocks

    @property
    def inode_bitmaps(self) -> int:
        """First inode bitmap; one block each."""
        return self.block_bitmaps + self.groups

    @property
    def inode_table(self) -> int:
        """First block of all inode tables, which follow one another."""
        return self.inode_bitmaps + self.groups

    @property
    def table_blocks(self) -> int:
        """Blocks of all inode tables together."""
        return self.groups * self.inodes_per_group // INODES_PER_BLOCK

    @property
    def others(self) -> int:
        """First block behind the inode tables."""
        return self.inode_table + self.table_blocks


def find_geometry(
    inodes: int, other_blocks: int, layer_blocks: list[int], free_blocks: int
) -> Geometry:
    """The smallest disk that holds `inodes` inodes and `other_blocks` blocks of metadata in its
    window, the layers' regions, and `free_blocks` blocks behind them."""
    groups = 1
    metadata = 0
    while True:
        plan = plan_disk(metadata, layer_blocks)
        disk = plan.disk_blocks + free_blocks
        needed = max(-(-disk // GROUP_BLOCKS), -(-inodes // MAX_INODES_PER_GROUP))
        groups = max(groups, needed)
        if -(-disk // GROUP_BLOCKS) < groups:
            disk = groups * GROUP_BLOCKS  # inodes alone ask for more groups
        if disk > MAX_DISK_BLOCKS:
            raise LimitExceeded(f"the image needs a disk of {disk} blocks, over {MAX_DISK_BLOCKS}")
        per_group = -(-inodes // groups)
        per_group = max(INODES_PER_BLOCK, -(-per_group // INODES_PER_BLOCK) * INODES_PER_BLOCK)
        geometry = Geometry(
            DiskPlan(plan.window_blocks, plan.layer_start_blocks, disk),
            groups,
            per_group,
            -(-groups * DESCRIPTOR.size // BLOCK),
        )
        metadata = geometry.others + other_blocks
        if metadata <= plan.window_blocks:
            return geometry


def pack_superblock(
    geometry: Geometry, *, free_blocks: int, free_inodes: int, uuid: bytes
) -> bytes:
    """The 1024-byte superblock. No time in it comes from a clock."""
    block = bytearray(1024)

    def put(offset: int, form: str, *values: int | bytes) -> None:
        struct.pack_into("<" + form, block, offset, *values)

    put(
        0,
        "11I",
        geometry.groups * geometry.inodes_per_group,
        geometry.plan.disk_blocks,
        0,
        free_blocks,
        free_inodes,
        0,
        2,
        2,
        GROUP_BLOCKS,
        GROUP_BLOCKS,
        geometry.inodes_per_group,
    )
    # Never checked by count or age; clean; errors are gone on with (a reader stays a reader).
    put(0x36, "HHHHH", 0xFFFF, 0xEF53, 1, 1, 0)
    put(0x4C, "I", 1)  # dynamic revision
    put(0x54, "IHH", 11, INODE_SIZE, 0)
    put(0x5C, "III", COMPAT, INCOMPAT, RO_COMPAT)
    put(0x68, "16s", uuid)
    put(0xEC, "16sB", HASH_SEED, HALF_MD4)
    put(0x100, "I", 0xC)  # user_xattr and acl are on by default
    put(0x15C, "HHI", 32, 32, 2)  # extra inode bytes; unsigned directory hash
    put(0x174, "B", 2)  # log2 of the groups per flex group
    return bytes(block)
