"""A deterministic writer of cpio archives in the "newc" form, which Linux takes as initramfs. Pure.

Layout per entry: a 110-byte ASCII header of hexadecimal fields, the name with a NUL, padding to 4,
the contents, padding to 4; the archive ends with an entry named TRAILER!!!. Source: the kernel's
documentation of the initramfs buffer format.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_TRAILER: Final = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, directory or character device; `mode` holds type and permissions."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str) -> Entry:
    """A directory that everybody may enter."""
    return Entry(name, stat.S_IFDIR | 0o755)


def program(name: str, content: bytes) -> Entry:
    """An executable file."""
    return Entry(name, stat.S_IFREG | 0o755, content)


def plain(name: str, content: bytes) -> Entry:
    """A file that is only read."""
    return Entry(name, stat.S_IFREG | 0o644, content)


def character_device(name: str, major: int, minor: int) -> Entry:
    """A character device for root."""
    return Entry(name, stat.S_IFCHR | 0o600, b"", (major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of these entries in their order, owned by root, at time 0."""
    parts: list[bytes] = []
    for inode, entry in enumerate(entries, start=1):
        parts.append(_encode(entry, inode))
    parts.append(_encode(Entry(_TRAILER, 0), 0))
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % 512)


def _encode(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (
        inode,
        entry.mode,
        0,  # uid
        0,  # gid
        links,
        0,  # mtime
        len(entry.content),
        0,  # device of the archive's file system
        0,
        *entry.device,
        len(name),
        0,  # checksum, unused in this form
    )
    header = b"070701" + b"".join(b"%08X" % value for value in numbers)
    head = header + name
    return head + bytes(-len(head) % 4) + entry.content + bytes(-len(entry.content) % 4)
