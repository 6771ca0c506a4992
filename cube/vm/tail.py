"""Keeps the last lines of a stream of untrusted text."""

from __future__ import annotations

from typing import Final

from cube.records import printable

_LIMIT: Final = 16 * 1024


class Tail:
    """The last 16 KiB of what was fed, as printable lines."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, received: bytes) -> None:
        """Adds bytes and forgets the oldest over the limit."""
        self._kept += received
        if len(self._kept) > _LIMIT:
            del self._kept[: len(self._kept) - _LIMIT]

    def contains(self, mark: bytes) -> bool:
        """Whether the kept bytes hold this mark."""
        return mark in self._kept

    def lines(self) -> list[str]:
        """The non-empty lines, control characters made visible."""
        decoded = printable(bytes(self._kept).replace(b"\r", b""))
        return [line for line in decoded.splitlines() if line.strip()]
