"""ext4 directories: linear blocks, and hashed trees (htree) for those of two blocks and more.

Format: Linux fs/ext4/namei.c and hash.c; Documentation/filesystems/ext4/directory.rst. The hash is
half MD4 over unsigned bytes, seeded by the superblock's constant seed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

from imagecache.errors import LimitExceeded
from imagecache.flatten.kinds import shown

BLOCK = 4096
HASH_SEED = hashlib.sha256(b"cubecache ext4 directory hash").digest()[:16]
HALF_MD4 = 1
ROOT_LIMIT = (BLOCK - 32) // 8
NODE_LIMIT = (BLOCK - 8) // 8
DIRECTORY_TYPE = 2

_ENTRY = struct.Struct("<IHBB")
_SEED_WORDS = struct.unpack("<4I", HASH_SEED)
_MASK = 0xFFFFFFFF
_K2 = 0x5A827999
_K3 = 0x6ED9EBA1
Resolve = Callable[[bytes], tuple[int, int]]  # name -> (inode number, file type)


def _hash_words(name: bytes) -> list[int]:
    """Eight words of up to 32 bytes, padded with the length's byte."""
    pad = len(name) & 0xFF
    pad |= pad << 8
    pad |= pad << 16
    words: list[int] = []
    part = name[:32]
    whole = len(part) // 4
    words.extend(struct.unpack_from(f">{whole}I", part))
    if len(words) < 8:
        value = pad
        for byte in part[4 * whole :]:
            value = (value << 8 | byte) & _MASK
        words.append(value)
    words.extend([pad] * (8 - len(words)))
    return words


def _half_md4(state: tuple[int, int, int, int], x: list[int]) -> tuple[int, int, int, int]:
    a, b, c, d = state
    for i in (0, 4):
        a = a + (d ^ (b & (c ^ d))) + x[i] & _MASK
        a = a << 3 & _MASK | a >> 29
        d = d + (c ^ (a & (b ^ c))) + x[i + 1] & _MASK
        d = d << 7 & _MASK | d >> 25
        c = c + (b ^ (d & (a ^ b))) + x[i + 2] & _MASK
        c = c << 11 & _MASK | c >> 21
        b = b + (a ^ (c & (d ^ a))) + x[i + 3] & _MASK
        b = b << 19 & _MASK | b >> 13
    for i in (1, 0):
        a = a + ((b & c) + ((b ^ c) & d)) + x[i] + _K2 & _MASK
        a = a << 3 & _MASK | a >> 29
        d = d + ((a & b) + ((a ^ b) & c)) + x[i + 2] + _K2 & _MASK
        d = d << 5 & _MASK | d >> 27
        c = c + ((d & a) + ((d ^ a) & b)) + x[i + 4] + _K2 & _MASK
        c = c << 9 & _MASK | c >> 23
        b = b + ((c & d) + ((c ^ d) & a)) + x[i + 6] + _K2 & _MASK
        b = b << 13 & _MASK | b >> 19
    for i in (3, 1):
        a = a + (b ^ c ^ d) + x[i] + _K3 & _MASK
        a = a << 3 & _MASK | a >> 29
        d = d + (a ^ b ^ c) + x[i + 4] + _K3 & _MASK
        d = d << 9 & _MASK | d >> 23
        c = c + (d ^ a ^ b) + x[i - 1] + _K3 & _MASK
        c = c << 11 & _MASK | c >> 21
        b = b + (c ^ d ^ a) + x[i + 3] + _K3 & _MASK
        b = b << 15 & _MASK | b >> 17
    return (
        state[0] + a & _MASK,
        state[1] + b & _MASK,
        state[2] + c & _MASK,
        state[3] + d & _MASK,
    )


def name_hash(name: bytes) -> tuple[int, int]:
    """(major, minor) hash of a name; the major one is even, and never the end mark."""
    state = (_SEED_WORDS[0], _SEED_WORDS[1], _SEED_WORDS[2], _SEED_WORDS[3])
    rest = name
    while rest:
        state = _half_md4(state, _hash_words(rest))
        rest = rest[32:]
    major = state[1] & ~1
    if major == 0xFFFFFFFE:
        major = 0xFFFFFFFC
    return major, state[2]


def _room(name: bytes) -> int:
    return 8 + -(-len(name) // 4) * 4


class DirectoryShape:
    """How a directory's names fall into blocks; fixed by the names alone."""

    __slots__ = ("hashes", "leaves", "nodes")

    def __init__(self, names: list[bytes], owner: bytes) -> None:
        """`names` without "." and ".."; raises `LimitExceeded` for more than ext4 indexes."""
        self.hashes: list[int] = []  # first hash of each leaf, with the bit for continued ones
        self.nodes = 0
        if 24 + sum(map(_room, names)) <= BLOCK:
            self.leaves = [sorted(names)]
            return
        hashed = sorted((name_hash(name), name) for name in names)
        self.leaves = []
        leaf: list[bytes] = []
        used = BLOCK
        last = -1
        for (major, _), name in hashed:
            need = _room(name)
            if used + need > BLOCK:
                leaf = []
                self.leaves.append(leaf)
                self.hashes.append(major | (major == last))
                used = 0
            leaf.append(name)
            used += need
            last = major
        if len(self.leaves) > ROOT_LIMIT:
            self.nodes = -(-len(self.leaves) // NODE_LIMIT)
        if self.nodes > ROOT_LIMIT:
            raise LimitExceeded(f"{shown(owner)}: too many names for an ext4 directory")

    @property
    def is_indexed(self) -> bool:
        """Whether it has a hashed tree."""
        return bool(self.hashes)

    @property
    def blocks(self) -> int:
        """Blocks of the directory: root of the tree and nodes too."""
        return len(self.leaves) + self.nodes + self.is_indexed

    def write(self, own: int, parent: int, resolve: Resolve) -> list[bytes]:
        """All blocks in logical order."""
        dots = [(b".", own, DIRECTORY_TYPE), (b"..", parent, DIRECTORY_TYPE)]
        if not self.is_indexed:
            rest = [(name, *resolve(name)) for name in self.leaves[0]]
            return [entry_block(dots + rest)]
        leaves = [entry_block([(name, *resolve(name)) for name in leaf]) for leaf in self.leaves]
        first_leaf = 1 + self.nodes
        pointers = [(value, first_leaf + order) for order, value in enumerate(self.hashes)]
        nodes: list[bytes] = []
        if self.nodes:
            above: list[tuple[int, int]] = []
            for at in range(0, len(pointers), NODE_LIMIT):
                group = pointers[at : at + NODE_LIMIT]
                above.append((group[0][0], 1 + len(nodes)))
                nodes.append(_ENTRY.pack(0, BLOCK, 0, 0) + _index(group, NODE_LIMIT))
            pointers = above
        head = entry_block(dots)[:24] + struct.pack("<IBBBB", 0, HALF_MD4, 8, bool(nodes), 0)
        return [head + _index(pointers, ROOT_LIMIT), *nodes, *leaves]


def _index(pointers: list[tuple[int, int]], limit: int) -> bytes:
    """Index entries; the first one's hash place holds the limit and the count."""
    parts = [struct.pack("<HHI", limit, len(pointers), pointers[0][1])]
    parts.extend(struct.pack("<II", *pointer) for pointer in pointers[1:])
    return b"".join(parts).ljust(limit * 8, b"\0")


def entry_block(entries: list[tuple[bytes, int, int]]) -> bytes:
    """One block of (name, inode number, file type); the last entry reaches to its end."""
    parts: list[bytes] = []
    used = 0
    for order, (name, number, file_type) in enumerate(entries):
        room = _room(name) if order < len(entries) - 1 else BLOCK - used
        parts.append((_ENTRY.pack(number, room, len(name), file_type) + name).ljust(room, b"\0"))
        used += room
    return b"".join(parts)


EMPTY_BLOCK = _ENTRY.pack(0, BLOCK, 0, 0).ljust(BLOCK, b"\0")
