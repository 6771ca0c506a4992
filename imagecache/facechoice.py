"""Which face with which options, as one text that travels through requests and the API."""

from __future__ import annotations

import re
from dataclasses import dataclass

from imagecache.blockimage.manifest import Face, canonical_options
from imagecache.chunks import BLOCK
from imagecache.errors import UsageError

_TEXT = re.compile(r"(erofs|ext4)(?::free=(\d{1,15}))?")
MAX_FREE = 8 << 40


@dataclass(frozen=True, slots=True)
class FaceChoice:
    """A face and the options that enter its block image's identity.

    As text: `erofs`, `ext4`, or `ext4:free=BYTES` for a disk with room to write.
    """

    face: Face
    free_bytes: int = 0

    @classmethod
    def parse(cls, text: str) -> FaceChoice:
        """Raises UsageError."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise UsageError(f"{text!r} is not a face", remedy="use --fs erofs or --fs ext4")
        free = int(match[2] or 0)
        if free and match[1] != "ext4":
            raise UsageError("an EROFS image cannot be written to", remedy="--free needs --fs ext4")
        if free > MAX_FREE:
            raise UsageError(f"{free} bytes of free space are over {MAX_FREE}")
        return cls(Face.parse(match[1]), -(-free // BLOCK) * BLOCK)

    @property
    def options(self) -> str:
        """The canonical JSON of the options."""
        return canonical_options({"free_bytes": self.free_bytes} if self.free_bytes else {})

    def __str__(self) -> str:
        name = self.face.name.lower()
        return f"{name}:free={self.free_bytes}" if self.free_bytes else name
