"""ext4 extended attributes: in the inode's spare 92 bytes, else in one block that equal sets share.

Format: Linux fs/ext4/xattr.h, xattr.c and acl.h. Entries stand sorted by (index, name length,
name); values from the end backwards. POSIX ACLs have a shorter form of their own. Attributes over
one block and the inode's rest are refused by name (the ea_inode feature is not used).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from imagecache.errors import LimitExceeded
from imagecache.faces.ext4_inodes import BLOCK, INODE_SIZE, XATTRS_AT
from imagecache.flatten.kinds import shown
from imagecache.flatten.xattrs import ACL_ACCESS, ACL_DEFAULT, Xattrs

MAGIC = 0xEA020000
MAX_SHARED = 1024  # inodes per attribute block that the kernel allows
INODE_ROOM = INODE_SIZE - XATTRS_AT - 4
BLOCK_HEADER = 32
_ENTRY = struct.Struct("<BBHIII")
_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_Item = tuple[int, int, bytes, bytes]  # index, name length, name, value: sorts as the kernel wants


@dataclass(frozen=True, slots=True)
class PackedXattrs:
    """A set of attributes: what goes into the inode, and what into a block (b"" for nothing)."""

    in_inode: bytes
    block: bytes


def acl_body(value: bytes) -> bytes:
    """A POSIX ACL in ext4's form: version 1, and no id where the tag needs none."""
    parts = [struct.pack("<I", 1)]
    for at in range(4, len(value), 8):
        tag = int.from_bytes(value[at : at + 2], "little")
        parts.append(value[at : at + 8] if tag in (0x02, 0x08) else value[at : at + 4])
    return b"".join(parts)


def _items(xattrs: Xattrs) -> list[_Item]:
    items: list[_Item] = []
    for name, value in xattrs:
        if name in (ACL_ACCESS, ACL_DEFAULT):
            items.append((2 if name == ACL_ACCESS else 3, 0, b"", acl_body(value)))
            continue
        for prefix, index in _PREFIXES:
            if name.startswith(prefix):
                suffix = name[len(prefix) :]
                items.append((index, len(suffix), suffix, value))
    return sorted(items)


def _space(item: _Item) -> int:
    return _ENTRY.size + -(-item[1] // 4) * 4 + -(-len(item[3]) // 4) * 4


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & 0xFFFFFFFF


def entry_hash(name: bytes, value: bytes) -> int:
    """The hash of an entry in a block: over the name's bytes, then the value's words."""
    result = 0
    for byte in name:
        result = _rotate(result, 5) ^ byte
    padded = value + bytes(-len(value) % 4)
    for (word,) in struct.iter_unpack("<I", padded):
        result = _rotate(result, 16) ^ word
    return result


def _area(items: list[_Item], size: int, origin: int, *, hashed: bool) -> tuple[bytes, list[int]]:
    """(entries and values in `size` bytes, entry hashes); offsets count from `origin` before."""
    area = bytearray(size)
    at = 0
    end = size
    hashes: list[int] = []
    for index, length, name, value in items:
        end -= -(-len(value) // 4) * 4
        area[end : end + len(value)] = value
        hashes.append(entry_hash(name, value) if hashed else 0)
        offset = end + origin if value else 0
        area[at : at + _ENTRY.size] = _ENTRY.pack(length, index, offset, 0, len(value), hashes[-1])
        at += _ENTRY.size
        area[at : at + length] = name
        at += -(-length // 4) * 4
    return bytes(area), hashes


def pack_xattrs(xattrs: Xattrs, owner: bytes) -> PackedXattrs:
    """A set in ext4's form; the block lacks its reference count (`with_references`).

    Raises `LimitExceeded` naming the file and the attribute where it fits nowhere.
    """
    items = _items(xattrs)
    if not items:
        return PackedXattrs(b"", b"")
    inside = items
    outside: list[_Item] = []
    room = BLOCK - BLOCK_HEADER - 4
    if sum(map(_space, items)) > INODE_ROOM - 4:
        inside = []
        outside = items
        need = sum(map(_space, items))
        free = INODE_ROOM - 4
        for item in sorted(items, key=_space):
            if need <= room:
                break
            if _space(item) > free:
                largest = max(items, key=_space)
                raise LimitExceeded(
                    f"{shown(owner)}: its extended attributes (the largest is {shown(largest[2])} "
                    f"with {len(largest[3])} bytes) are too large for ext4",
                    remedy="use --fs erofs, or drop them from the image",
                )
            free -= _space(item)
            need -= _space(item)
            inside.append(item)
            outside = [other for other in outside if other is not item]
        inside.sort()
    in_inode = b""
    if inside:
        in_inode = struct.pack("<I", MAGIC) + _area(inside, INODE_ROOM, 0, hashed=False)[0]
    block = b""
    if outside:
        area, hashes = _area(outside, BLOCK - BLOCK_HEADER, BLOCK_HEADER, hashed=True)
        total = 0
        for value in hashes:
            total = _rotate(total, 16) ^ value
        if 0 in hashes:
            total = 0
        block = struct.pack("<IIII16x", MAGIC, 1, 1, total) + area
    return PackedXattrs(in_inode, block)


def with_references(block: bytes, count: int) -> bytes:
    """An attribute block that `count` inodes share."""
    return block[:4] + struct.pack("<I", count) + block[8:]
