"""LZ4's legacy frame, as kernels are packed with it. Pure; a kernel takes some seconds.

Format, from the lz4 project's lz4_Frame_format.md and lz4_Block_format.md: magic 0x184C2102, then
blocks of a 4-byte length and at most 8 MiB unpacked each, to the end. A block is a run of
sequences: a token (literals' count above, match's below, each 15 continued by bytes until one is
not 255), literals, a 2-byte offset back, the match of at least 4 bytes; the last has no match.
"""

from __future__ import annotations

import struct
from typing import Final

from imagecache.errors import Rejected

MAGIC: Final = b"\x02\x21\x4c\x18"
_BLOCK_LIMIT: Final = 8 * 1024 * 1024
_TRAILER: Final = 4  # the kernel's unpacked length, which its build appends


def unpack_legacy(packed: bytes, limit: int) -> bytes:
    """What is in it; raises Rejected for anything cut off, out of range or over `limit`."""
    if packed[:4] != MAGIC:
        raise Rejected("it is no LZ4 file of the legacy kind")
    unpacked = bytearray()
    at, end = 4, len(packed) - _TRAILER
    while at < end:
        if packed[at : at + 4] == MAGIC:
            at += 4
            continue
        (size,) = struct.unpack_from("<I", packed, at)
        at += 4
        if at + size > len(packed):
            raise Rejected("an LZ4 block is cut off")
        unpacked += _block(packed[at : at + size])
        at += size
        if len(unpacked) > limit:
            raise Rejected(f"it is over {limit} bytes unpacked")
    return bytes(unpacked)


def _block(packed: bytes) -> bytearray:
    made = bytearray()
    at, end = 0, len(packed)
    try:
        while at < end:
            token = packed[at]
            at += 1
            count = token >> 4
            if count == 15:
                more = 255
                while more == 255:
                    more = packed[at]
                    at += 1
                    count += more
            if at + count > end:
                raise Rejected("LZ4 literals are cut off")
            made += packed[at : at + count]
            at += count
            if at == end:
                break
            offset = packed[at] | packed[at + 1] << 8
            at += 2
            count = (token & 15) + 4
            if count == 19:
                more = 255
                while more == 255:
                    more = packed[at]
                    at += 1
                    count += more
            begin = len(made) - offset
            if offset == 0 or begin < 0 or len(made) + count > _BLOCK_LIMIT:
                raise Rejected("an LZ4 match is out of range")
            if offset >= count:
                made += made[begin : begin + count]
            else:
                piece = made[begin:]
                made += (piece * (count // offset + 1))[:count]
    except IndexError as error:
        raise Rejected("an LZ4 block is cut off") from error
    if len(made) > _BLOCK_LIMIT:
        raise Rejected("an LZ4 block is over 8 MiB unpacked")
    return made
