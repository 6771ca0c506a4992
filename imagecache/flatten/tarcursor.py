"""A cursor over a layer's plaintext: takes header blocks and payload pieces, skips the rest."""

from __future__ import annotations

from imagecache.errors import Rejected
from imagecache.flatten.decompress import LayerStream
from imagecache.flatten.tarheader import BLOCK


class TarCursor:
    """Cursor over the stream: header blocks, and the current member's payload."""

    def __init__(self, stream: LayerStream) -> None:
        self._stream = stream
        self._buffer = b""
        self._at = 0
        self._base = 0  # layer offset of _buffer[0]
        self.remaining = 0  # payload bytes of the current member not yet taken
        self.padding = 0

    @property
    def position(self) -> int:
        """Layer offset of the next byte."""
        return self._base + self._at

    def peek(self, size: int) -> bytes:
        """The next `size` bytes without taking them; fewer where the layer ends."""
        while len(self._buffer) - self._at < size:
            piece = self._stream.piece()
            if not piece:
                break
            self._base += self._at
            self._buffer = self._buffer[self._at :] + piece
            self._at = 0
        return self._buffer[self._at : self._at + size]

    def block(self, what: str) -> bytes:
        """Take one block. Raises `Rejected` where the layer ends inside it."""
        block = self.peek(BLOCK)
        if len(block) < BLOCK:
            raise Rejected(
                f"layer ends at its byte {self.position} inside {what}",
                remedy="the layer is truncated: push it again",
            )
        self._at += BLOCK
        return block

    def begin(self, size: int) -> None:
        """Set the payload of the member whose header was just taken."""
        self.remaining = size
        self.padding = -size % BLOCK

    def payload_block(self) -> bytes:
        """Take one block of the current payload (sparse maps)."""
        if self.remaining < BLOCK:
            raise Rejected(f"sparse map at byte {self.position} is longer than its member")
        self.remaining -= BLOCK
        return self.block("a sparse map")

    def read_payload(self, limit: int) -> bytes:
        """Take a non-empty piece of the current payload, at most `limit` bytes."""
        limit = min(limit, self.remaining)
        at = self._at
        buffer = self._buffer
        if at >= len(buffer):
            buffer = self._stream.piece()
            if not buffer:
                raise Rejected(
                    f"layer ends at its byte {self.position} inside a file's data",
                    remedy="the layer is truncated: push it again",
                )
            self._base += at
            self._buffer = buffer
            at = self._at = 0
        if limit <= 0:
            raise Rejected(f"file data at byte {self.position} is read out of turn")
        piece = buffer if not at and limit >= len(buffer) else buffer[at : at + limit]
        self._at = at + len(piece)
        self.remaining -= len(piece)
        return piece

    def take_all(self, what: str) -> bytes:
        """Take the whole (small, already capped) payload and its padding."""
        size = self.remaining
        body = self.peek(size + self.padding)
        if len(body) < size:
            raise Rejected(f"layer ends at its byte {self.position} inside {what}")
        self._at += len(body)
        self.remaining = self.padding = 0
        return body[:size]

    def finish_member(self) -> None:
        """Skip what was not read. The padding of the very last member may be missing."""
        skip = self.remaining + self.padding
        while skip:
            have = len(self._buffer) - self._at
            if have >= skip:
                self._at += skip
                break
            skip -= have
            piece = self._stream.piece()
            self._base += len(self._buffer)
            self._buffer = piece
            self._at = 0
            if not piece:
                if skip > self.padding:
                    raise Rejected(
                        f"layer ends at its byte {self._base} inside a file's data",
                        remedy="the layer is truncated: push it again",
                    )
                break
        self.remaining = self.padding = 0

    def drain(self) -> None:
        """Read the stream to its verified end."""
        self._buffer = b""
        self._stream.drain()
