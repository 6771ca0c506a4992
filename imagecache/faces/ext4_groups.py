"""Block groups of an ext4 face: bitmaps, descriptors and the superblock's counts."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from imagecache.faces.ext4_geometry import DESCRIPTOR, GROUP_BLOCKS, Geometry, pack_superblock
from imagecache.faces.ext4_inodes import BLOCK, INODES_PER_BLOCK


def set_bits(bitmap: bytearray, start: int, count: int) -> None:
    """Set `count` bits from bit `start`, little end first."""
    if count <= 0:
        return
    end = start + count
    first, last = start // 8, end // 8
    if first == last:
        bitmap[first] |= (1 << end % 8) - (1 << start % 8)
        return
    bitmap[first] |= 0xFF & ~((1 << start % 8) - 1)
    bitmap[first + 1 : last] = b"\xff" * (last - first - 1)
    if end % 8:
        bitmap[last] |= (1 << end % 8) - 1


def pack_head(
    geometry: Geometry,
    blocks: bytearray,
    inodes: bytearray,
    *,
    directory_numbers: Iterable[int],
    first_table: bytes,
    rest: Sequence[bytes],
) -> bytes:
    """The head section: superblock, descriptors, bitmaps, the first block of the inode table.

    `blocks` and `inodes` are the bitmaps; the uuid is made from everything, `rest` included.
    """
    directories = array("I", bytes(4 * geometry.groups))
    per_group = geometry.inodes_per_group
    for number in directory_numbers:
        directories[(number - 1) // per_group] += 1
    descriptors: list[bytes] = []
    all_free_blocks = all_free_inodes = 0
    for group in range(geometry.groups):
        part = slice(group * BLOCK, (group + 1) * BLOCK)
        free_blocks = GROUP_BLOCKS - int.from_bytes(blocks[part], "little").bit_count()
        free_inodes = GROUP_BLOCKS - int.from_bytes(inodes[part], "little").bit_count()
        all_free_blocks += free_blocks
        all_free_inodes += free_inodes
        descriptors.append(
            DESCRIPTOR.pack(
                geometry.block_bitmaps + group,
                geometry.inode_bitmaps + group,
                geometry.inode_table + group * per_group // INODES_PER_BLOCK,
                free_blocks,
                free_inodes,
                directories[group],
                0,
                0,
                0,
                0,
                0,
                0,
            )
        )
    table = b"".join(descriptors).ljust(geometry.descriptor_blocks * BLOCK, b"\0")
    after = table + bytes(blocks) + bytes(inodes) + first_table
    digest = hashlib.sha256(b"cubecache ext4 1\0" + after)
    for section in rest:
        digest.update(section)
    uuid = bytearray(digest.digest()[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80  # RFC 9562 version 8, variant 10
    uuid[8] = uuid[8] & 0x3F | 0x80
    superblock = pack_superblock(
        geometry, free_blocks=all_free_blocks, free_inodes=all_free_inodes, uuid=bytes(uuid)
    )
    return (bytes(1024) + superblock).ljust(BLOCK, b"\0") + after
