"""Content digests as image manifests write them: `sha256:<64 hex>` or `sha512:<128 hex>`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Protocol

from imagecache.errors import Rejected

_GRAMMAR = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")


class Hasher(Protocol):
    """The part of a hashlib object that verification needs."""

    def update(self, piece: bytes | bytearray | memoryview, /) -> None:
        """Take in the next bytes."""

    def hexdigest(self) -> str:
        """The digest so far, in lower-case hex."""


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A checked digest: both fields have passed the grammar, so they are safe in a path or URL."""

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: object) -> Digest:
        """Parse strictly: lower-case hex of the exact length. Raises `Rejected` on all else."""
        if not isinstance(text, str) or len(text) > 135 or not _GRAMMAR.match(text):
            shown = ascii(text[:80]) if isinstance(text, str) else type(text).__name__
            raise Rejected(
                f"not a digest: {shown}",
                remedy="digests are sha256:<64 hex> or sha512:<128 hex>, lower case",
            )
        algorithm, _, encoded = text.partition(":")
        return cls(algorithm, encoded)

    @classmethod
    def of(cls, body: bytes, algorithm: str = "sha256") -> Digest:
        """The digest of `body`."""
        return cls(algorithm, hashlib.new(algorithm, body).hexdigest())

    def hasher(self) -> Hasher:
        """A fresh hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def matches(self, hasher: Hasher) -> bool:
        """Whether `hasher`, made by `hasher()`, has seen exactly this digest's content."""
        return hasher.hexdigest() == self.hex

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"
