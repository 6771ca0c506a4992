"""Reading a blob while it is still being downloaded."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from imagecache.errors import NotFound

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_BYTES = 256 << 10
_PAUSE_SECONDS = 0.005
_OPEN_ATTEMPTS = 3


class GrowingBlob(io.RawIOBase):
    """A blob of `size` bytes, of which `path.partial` or `path` holds as many as have arrived.

    A read waits for bytes that are still to come; whoever starts the reader ends it when the
    download fails. What is read is as yet unproven: nothing may be committed before the
    download has compared the digest.
    """

    def __init__(self, path: Path, size: int) -> None:
        """Raises NotFound where neither file is there."""
        super().__init__()
        self._file = _open(path)
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fills the buffer with at least one byte, or none at the blob's end."""
        room = memoryview(buffer).cast("B")[: self._size - self._at]
        if not room:
            return 0
        while not (taken := os.preadv(self._file, [room], self._at)):
            time.sleep(_PAUSE_SECONDS)
        self._at += taken
        return taken

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            os.close(self._file)
        super().close()


def open_blob(path: Path, size: int) -> io.BufferedReader:
    """A blob of the spool as the parsers read it, complete or still growing."""
    return io.BufferedReader(GrowingBlob(path, size), READ_BYTES)


def _open(path: Path) -> int:
    # A blob that is complete loses its ".partial" between two attempts at most once.
    for _ in range(_OPEN_ATTEMPTS):
        for name in (path.with_name(path.name + ".partial"), path):
            try:
                return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
    raise NotFound(f"blob {path.name} is not in the spool")
