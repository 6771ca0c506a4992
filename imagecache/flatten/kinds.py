"""File kinds as the top four bits of st_mode, and how names are shown in messages."""

from __future__ import annotations

from typing import Final

HARD_LINK: Final = 0  # a tar member only: another name for an earlier file
FIFO: Final = 0o01
CHARACTER: Final = 0o02
DIRECTORY: Final = 0o04
BLOCK_DEVICE: Final = 0o06
REGULAR: Final = 0o10
SYMLINK: Final = 0o12
SOCKET: Final = 0o14

DEVICES: Final = frozenset((CHARACTER, BLOCK_DEVICE))
FILE_KINDS: Final = frozenset((FIFO, CHARACTER, DIRECTORY, BLOCK_DEVICE, REGULAR, SYMLINK, SOCKET))

MAX_MAJOR: Final = (1 << 12) - 1  # Linux dev_t: 12 bits major, 20 bits minor
MAX_MINOR: Final = (1 << 20) - 1


def device_number(major: int, minor: int) -> int:
    """One integer for a device: major << 20 | minor."""
    return major << 20 | minor


def shown(name: bytes) -> str:
    """A name for people: escapes all but printable ASCII, and cut at 200 characters."""
    text = "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}"
        for byte in name[:200]
    )
    return f"'{text}'" if len(name) <= 200 else f"'{text}...' ({len(name)} bytes)"
