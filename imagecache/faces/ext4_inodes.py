"""ext4 inodes and extent trees, as 256-byte records and 4 KiB blocks.

Format: Linux fs/ext4/ext4.h and ext4_extents.h; Documentation/filesystems/ext4. No checksums
(metadata_csum is off), 32 extra bytes for nanoseconds and the creation time.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from imagecache.flatten import kinds

BLOCK = 4096
INODE_SIZE = 256
INODES_PER_BLOCK = BLOCK // INODE_SIZE
EXTRA_SIZE = 32
XATTRS_AT = 128 + EXTRA_SIZE

EXTENTS_FLAG = 0x80000
INDEX_FLAG = 0x1000
FAST_SYMLINK = 59  # longest target that fits into the inode
MAX_LINKS = 65000

MIN_SECONDS = -(1 << 31)
MAX_SECONDS = (1 << 31) - 1 + (3 << 32)

_INODE = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHHHHIIIII8x")
_EXTENT_HEADER = struct.Struct("<HHHHI")
_EXTENT = struct.Struct("<IHHI")
_EXTENT_INDEX = struct.Struct("<IIHH")
EXTENT_MAGIC = 0xF30A
MAX_EXTENT_BLOCKS = 32768
INODE_EXTENTS = 4
BLOCK_EXTENTS = (BLOCK - 12) // 12


@dataclass(frozen=True, slots=True)
class InodeFields:
    """What an inode record holds; `blocks` counts 4 KiB blocks, of xattrs and extents too."""

    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_ns: int
    links: int
    size: int
    blocks: int
    flags: int
    body: bytes  # i_block, at most 60 bytes
    xattr_block: int = 0
    xattrs: bytes = b""  # in-inode attributes with their magic, at most 96 bytes


def pack_time(seconds: int, nanoseconds: int) -> tuple[int, int]:
    """(low word, extra word) of a time, clamped to what 34 bits of seconds hold."""
    if seconds < MIN_SECONDS:
        seconds, nanoseconds = MIN_SECONDS, 0
    elif seconds >= MAX_SECONDS:
        seconds, nanoseconds = MAX_SECONDS, 0
    epoch = (seconds - MIN_SECONDS) >> 32
    return seconds & 0xFFFFFFFF, nanoseconds << 2 | epoch


def pack_inode(fields: InodeFields) -> bytes:
    """One 256-byte inode; all four of its times are the modification time."""
    low, extra = pack_time(fields.mtime, fields.mtime_ns)
    sectors = fields.blocks * (BLOCK // 512)
    record = _INODE.pack(
        fields.mode,
        fields.uid & 0xFFFF,
        fields.size & 0xFFFFFFFF,
        low,
        low,
        low,
        0,
        fields.gid & 0xFFFF,
        fields.links,
        sectors & 0xFFFFFFFF,
        fields.flags,
        0,
        fields.body,
        0,
        fields.xattr_block,
        fields.size >> 32,
        0,
        sectors >> 32,
        0,
        fields.uid >> 16,
        fields.gid >> 16,
        0,
        0,
        EXTRA_SIZE,
        0,
        extra,
        extra,
        extra,
        low,
        extra,
    )
    return (record + fields.xattrs).ljust(INODE_SIZE, b"\0")


def device_body(rdev: int) -> bytes:
    """i_block of a device: the old 8:8 form where it fits, else the new one in the second word."""
    major, minor = rdev >> 20, rdev & 0xFFFFF
    if major < 256 and minor < 256:
        return struct.pack("<II", major << 8 | minor, 0)
    return struct.pack("<II", 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)


def extent_block_count(blocks: int) -> int:
    """Blocks that the extent tree of a contiguous file takes outside its inode."""
    items = -(-blocks // MAX_EXTENT_BLOCKS)
    count = 0
    while items > INODE_EXTENTS:
        items = -(-items // BLOCK_EXTENTS)
        count += items
    return count


def extent_root(start: int, blocks: int, add_block: Callable[[bytes], int]) -> bytes:
    """i_block of a file that stands in `blocks` blocks from `start`; tree blocks go to
    `add_block`, which gives their address."""
    items: list[bytes] = []
    keys: list[int] = []
    for at in range(0, blocks, MAX_EXTENT_BLOCKS):
        keys.append(at)
        items.append(_EXTENT.pack(at, min(MAX_EXTENT_BLOCKS, blocks - at), 0, start + at))
    depth = 0
    while len(items) > INODE_EXTENTS:
        above: list[bytes] = []
        above_keys: list[int] = []
        for at in range(0, len(items), BLOCK_EXTENTS):
            group = items[at : at + BLOCK_EXTENTS]
            header = _EXTENT_HEADER.pack(EXTENT_MAGIC, len(group), BLOCK_EXTENTS, depth, 0)
            address = add_block(header + b"".join(group))
            above.append(_EXTENT_INDEX.pack(keys[at], address, 0, 0))
            above_keys.append(keys[at])
        items, keys = above, above_keys
        depth += 1
    header = _EXTENT_HEADER.pack(EXTENT_MAGIC, len(items), INODE_EXTENTS, depth, 0)
    return header + b"".join(items)


def is_slow_symlink(kind: int, target_size: int) -> bool:
    """Whether a symlink's target needs a block of its own."""
    return kind == kinds.SYMLINK and target_size > FAST_SYMLINK
