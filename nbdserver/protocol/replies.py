"""Replies of the transmission phase, framed as simple, structured or extended.

Byte tables (big endian): simple = magic u32, error u32, cookie 8 bytes; structured chunk = magic
u32, flags u16, type u16, cookie 8 bytes, length u32; extended chunk = magic u32, flags u16, type
u16, cookie 8 bytes, offset u64 (the request's), length u64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

from nbdserver.protocol.constants import (
    CHUNK_DONE,
    EXTENDED_REPLY_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    ReplyMode,
)

_SIMPLE_HEAD = Struct(">II")
_CHUNK_HEAD = Struct(">IHH")

SIMPLE_OK = _SIMPLE_HEAD.pack(SIMPLE_REPLY_MAGIC, 0)
STRUCTURED_DATA = _CHUNK_HEAD.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, Chunk.OFFSET_DATA)
EXTENDED_DATA = _CHUNK_HEAD.pack(EXTENDED_REPLY_MAGIC, CHUNK_DONE, Chunk.OFFSET_DATA)

_U32 = Struct(">I")
_U32_U64 = Struct(">IQ")
_U64_U64 = Struct(">QQ")
_U64_U64_U64 = Struct(">QQQ")
_ERROR = Struct(">IH")
_EXTENT = Struct(">II")
_EXTENT_EXT = Struct(">QQ")
_U32_MAX = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Extent:
    """`length` bytes of one status; flags as the metadata context defines them."""

    length: int
    flags: int


def encode_read_head(mode: int, cookie: bytes, offset: int, length: int) -> bytes:
    """The header of a successful read; `length` bytes of data follow it."""
    if mode == ReplyMode.SIMPLE:
        return SIMPLE_OK + cookie
    if mode == ReplyMode.STRUCTURED:
        return STRUCTURED_DATA + cookie + _U32_U64.pack(length + 8, offset)
    return EXTENDED_DATA + cookie + _U64_U64_U64.pack(offset, length + 8, offset)


def encode_done(mode: int, cookie: bytes, offset: int) -> bytes:
    """Success without data."""
    if mode != ReplyMode.EXTENDED:
        # Where no data goes, a simple reply is allowed beside structured ones too.
        return SIMPLE_OK + cookie
    return _chunk(mode, cookie, offset, flags=CHUNK_DONE, kind=Chunk.NONE, body=b"")


def encode_error(mode: int, cookie: bytes, offset: int, error: int, message: str = "") -> bytes:
    """A failed request; `error` is a protocol error value, `message` goes where it can be shown."""
    if mode == ReplyMode.SIMPLE:
        return _SIMPLE_HEAD.pack(SIMPLE_REPLY_MAGIC, error) + cookie
    text = message.encode("utf-8", "replace")[:256].decode("utf-8", "ignore").encode()
    body = _ERROR.pack(error, len(text)) + text
    return _chunk(mode, cookie, offset, flags=CHUNK_DONE, kind=Chunk.ERROR, body=body)


def encode_extents(
    mode: int, cookie: bytes, offset: int, statuses: Sequence[tuple[int, Sequence[Extent]]]
) -> bytes:
    """A BLOCK_STATUS reply: one chunk per (context id, extents), the last one marked as final."""
    parts = []
    for index, (context, extents) in enumerate(statuses):
        if mode == ReplyMode.EXTENDED:
            kind = Chunk.BLOCK_STATUS_EXT
            body = _EXTENT.pack(context, len(extents)) + b"".join(
                _EXTENT_EXT.pack(extent.length, extent.flags) for extent in extents
            )
        else:
            kind = Chunk.BLOCK_STATUS
            body = _U32.pack(context) + b"".join(
                _EXTENT.pack(min(extent.length, _U32_MAX), extent.flags) for extent in extents
            )
        done = CHUNK_DONE if index == len(statuses) - 1 else 0
        parts.append(_chunk(mode, cookie, offset, flags=done, kind=kind, body=body))
    return b"".join(parts)


def clip_extents(
    extents: Sequence[Extent], length: int, *, one: bool, limit: int, mode: int
) -> list[Extent]:
    """Extents made legal for the wire: merged, none empty, none past `length`, at most `limit`.

    Raises ValueError when the device answered none.
    """
    clipped: list[Extent] = []
    left = length
    for extent in extents:
        if left <= 0 or len(clipped) == limit:
            break
        size = min(extent.length, left)
        if size <= 0:
            continue
        if clipped and clipped[-1].flags == extent.flags:
            clipped[-1] = Extent(clipped[-1].length + size, extent.flags)
        elif clipped and one:
            break
        else:
            clipped.append(Extent(size, extent.flags))
        left -= size
    if not clipped:
        raise ValueError("no extent answered")
    if mode != ReplyMode.EXTENDED:
        # A length above 32 bits ends the answer: what comes after it would be misplaced.
        for index, extent in enumerate(clipped):
            if extent.length > _U32_MAX:
                return [*clipped[:index], Extent(_U32_MAX & ~0xFFFF, extent.flags)]
    return clipped


def _chunk(mode: int, cookie: bytes, offset: int, *, flags: int, kind: int, body: bytes) -> bytes:
    if mode == ReplyMode.STRUCTURED:
        head = _CHUNK_HEAD.pack(STRUCTURED_REPLY_MAGIC, flags, kind)
        return head + cookie + _U32.pack(len(body)) + body
    head = _CHUNK_HEAD.pack(EXTENDED_REPLY_MAGIC, flags, kind)
    return head + cookie + _U64_U64.pack(offset, len(body)) + body
