"""One layer blob as a stream of plaintext pieces: plain, gzip (all members), zstd (all frames).

The codec is told by magic bytes, never by the media type (C14 of the registry rows: the diff id
decides). Trailing zeros after the last gzip member are skipped, any other trailing bytes are
refused. Formats: RFC 1952, RFC 8878.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, Protocol

import zstandard
from isal import igzip_lib

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten.limits import Limits

RAW_PIECE = 256 << 10
PLAIN_PIECE = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_BLOCK = 128 << 10
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGICS = tuple(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))


class Hasher(Protocol):
    """What is fed every plaintext byte once, in order (a hashlib object)."""

    def update(self, data: bytes, /) -> None:
        """Take the next bytes."""


class LayerStream:
    """Plaintext of one layer, in order, in pieces; counts, caps and hashes what passes.

    Raises `Rejected` for broken compression and `LimitExceeded` for bombs.
    """

    def __init__(
        self, raw: BinaryIO, limits: Limits, hasher: Hasher | None, head: bytes, codec: str
    ) -> None:
        self.codec = codec
        self.raw_bytes = len(head)
        self.plain_bytes = 0
        self._raw = raw
        self._limits = limits
        self._hasher = hasher
        self._size_alarm = min(limits.ratio_floor, limits.layer_bytes)
        self._buffer = head
        self._at = 0  # of the first unused byte in _buffer
        self._feed = RAW_PIECE
        self._frames = 0
        self._gzip: igzip_lib.IgzipDecompressor | None = None
        self._zstd: zstandard.ZstdDecompressionObj | None = None
        self._zstd_checksum = 0
        self._zstd_context = zstandard.ZstdDecompressor(max_window_size=limits.window_bytes)
        next_plain: dict[str, Callable[[], bytes]] = {
            "none": self._next_plain,
            "gzip": self._next_gzip,
            "zstd": self._next_zstd,
        }
        self._next = next_plain[codec]

    def piece(self) -> bytes:
        """The next plaintext bytes, at most 1 MiB, or b"" at the verified end of the layer."""
        piece = self._next()
        if piece:
            self.plain_bytes += len(piece)
            if self.plain_bytes > self._size_alarm:
                self._check_size()
            if self._hasher is not None:
                self._hasher.update(piece)
        return piece

    def drain(self) -> None:
        """Read to the end, so that the hasher has seen all and trailers are verified."""
        while self.piece():
            pass

    def _check_size(self) -> None:
        if self.plain_bytes > self._limits.layer_bytes:
            raise LimitExceeded(
                f"layer is larger than {self._limits.layer_bytes} bytes uncompressed",
                remedy="raise [limits] layer_bytes if this image is trusted",
            )
        over_floor = self.plain_bytes > self._limits.ratio_floor
        if over_floor and self.plain_bytes > self._limits.ratio * max(self.raw_bytes, 1):
            raise LimitExceeded(
                f"layer expands {self.plain_bytes} bytes from {self.raw_bytes} "
                f"(more than {self._limits.ratio}:1)",
                remedy="raise [limits] ratio if this image is trusted",
            )

    def _next_plain(self) -> bytes:
        if self._buffer:
            head, self._buffer = self._buffer, b""
            return head
        return self._read_raw(PLAIN_PIECE)

    def _read_raw(self, size: int = RAW_PIECE) -> bytes:
        piece = self._raw.read(size)
        self.raw_bytes += len(piece)
        return piece

    def _need(self, size: int) -> bool:
        """Have `size` unused raw bytes in the buffer; False where the blob ends before."""
        while len(self._buffer) - self._at < size:
            more = self._read_raw()
            if not more:
                return False
            self._buffer = self._buffer[self._at :] + more
            self._at = 0
        return True

    def _count_frame(self) -> None:
        self._frames += 1
        if self._frames > self._limits.frames:
            raise LimitExceeded(
                f"layer has more than {self._limits.frames} compressed frames",
                remedy="raise [limits] frames if this image is trusted",
            )

    def _broken(self, what: str) -> Rejected:
        return Rejected(
            f"{self.codec} layer is broken near its byte {self.raw_bytes}: {what}",
            remedy="the blob must be built or pushed again",
        )

    # gzip -------------------------------------------------------------------------------------

    def _next_gzip(self) -> bytes:
        while True:
            decoder = self._gzip
            if decoder is None:
                decoder = self._open_member()
                if decoder is None:
                    return b""
                self._gzip = decoder
            raw = b""
            if decoder.needs_input:
                if not self._need(1):
                    raise self._broken("it ends inside a gzip member")
                raw = self._buffer[self._at : self._at + self._feed]
                self._at += len(raw)
            try:
                plain = decoder.decompress(raw, PLAIN_PIECE)
            except igzip_lib.IsalError as error:  # type: ignore[misc] # isal ships no stub of it
                raise self._broken(str(error)) from None
            if decoder.eof:
                unused = len(decoder.unused_data)
                self._at -= unused
                # Small members (one per file in eStargz) would copy the rest of a large feed each.
                self._feed = max(4096, min(RAW_PIECE, 2 * (len(raw) - unused)))
                self._gzip = None
            else:
                self._feed = min(RAW_PIECE, 2 * self._feed)
            if plain:
                return bytes(plain)

    def _open_member(self) -> igzip_lib.IgzipDecompressor | None:
        """A decoder for the next member, or None at the end (trailing zeros are no member)."""
        if self._need(2) and self._buffer.startswith(GZIP_MAGIC, self._at):
            self._count_frame()
            return igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
        while self._need(1):
            if self._buffer[self._at :].strip(b"\0"):
                raise self._broken("bytes other than zeros follow the last gzip member")
            self._at = len(self._buffer)
        return None

    # zstd -------------------------------------------------------------------------------------

    def _next_zstd(self) -> bytes:
        """Decode up to eight blocks: their headers are walked here, so that output is bounded.

        (libzstd would expand a 256 KiB piece of run-length blocks to 8 GiB in one call.)
        """
        while True:
            end = self._at
            if self._zstd is None:
                header = self._open_frame()
                if header == 0:
                    return b""
                end = self._at + header
            last = False
            for _ in range(PLAIN_PIECE // ZSTD_BLOCK):
                end, last = self._next_block(end)
                if last:
                    break
            decoder = self._zstd
            if decoder is None:  # _open_frame has set it
                raise AssertionError("zstd frame without a decoder")
            try:
                plain = decoder.decompress(self._buffer[self._at : end])
            except zstandard.ZstdError as error:
                raise self._broken(str(error)) from None
            self._at = end
            if last:
                if not decoder.eof or decoder.unused_data:
                    raise self._broken("its blocks and its frame end at different bytes")
                self._zstd = None
            if plain:
                return plain

    def _next_block(self, start: int) -> tuple[int, bool]:
        """The (end, is last) of the block at buffer offset `start`; the end may be rebased."""
        start -= self._at
        if not self._need(start + 3):
            raise self._broken("it ends inside a zstd frame")
        at = self._at + start
        header = int.from_bytes(self._buffer[at : at + 3], "little")
        size = header >> 3
        if size > ZSTD_BLOCK or header & 6 == 6:
            raise self._broken("it has an impossible zstd block header")
        stored = 1 if header & 6 == 2 else size
        last = bool(header & 1)
        length = start + 3 + stored + (self._zstd_checksum if last else 0)
        if not self._need(length):
            raise self._broken("it ends inside a zstd frame")
        return self._at + length, last

    def _open_frame(self) -> int:
        """Start a decoder for the next data frame; its header's length, or 0 at the layer's end."""
        while self._need(1):
            if not self._need(8):
                raise self._broken("bytes that are no zstd frame follow the last one")
            self._count_frame()
            at = self._at
            if self._buffer.startswith(SKIPPABLE_MAGICS, at):
                self._skip(8 + int.from_bytes(self._buffer[at + 4 : at + 8], "little"))
                continue
            if not self._buffer.startswith(ZSTD_MAGIC, at):
                raise self._broken("bytes that are no zstd frame follow the last one")
            flags = self._buffer[at + 4]
            single = flags >> 5 & 1
            content_size = (single, 2, 4, 8)[flags >> 6]
            self._zstd_checksum = flags & 4
            self._zstd = self._zstd_context.decompressobj()
            return 5 + (1 - single) + (0, 1, 2, 4)[flags & 3] + content_size
        return 0

    def _skip(self, size: int) -> None:
        while size > len(self._buffer) - self._at:
            size -= len(self._buffer) - self._at
            self._at = len(self._buffer)
            if not self._need(1):
                raise self._broken("it ends inside a skippable zstd frame")
        self._at += size


def open_layer(raw: BinaryIO, limits: Limits, hasher: Hasher | None = None) -> LayerStream:
    """A `LayerStream` over `raw` (a blob's file, read from its current place).

    `hasher` is updated with exactly the plaintext tar bytes; after `drain()` (which `members`
    does at its end) its digest is the diff id. Raises nothing before the first `piece()`.
    """
    head = raw.read(RAW_PIECE)
    while 0 < len(head) < 4 and (more := raw.read(RAW_PIECE)):
        head += more
    if head.startswith(GZIP_MAGIC):
        codec = "gzip"
    elif head.startswith((ZSTD_MAGIC, *SKIPPABLE_MAGICS)):
        codec = "zstd"
    else:
        codec = "none"
    return LayerStream(raw, limits, hasher, head, codec)
