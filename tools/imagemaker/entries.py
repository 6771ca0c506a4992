"""Layers written by hand: entries in, the bytes of an uncompressed PAX tar out."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# Mtimes of what is made here; also the clamp that mmdebstrap puts on what packages' scripts write.
EPOCH = 1_767_225_600  # 2026-01-01T00:00:00Z

_KINDS = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
}


@dataclass(frozen=True)
class Entry:
    """One member of a layer.

    `path` has no leading slash; bytes that are not UTF-8 are given through `os.fsdecode`. `target`
    is a symlink's text or a hard link's path inside the layer; `device` is (major, minor).
    """

    path: str
    kind: str = "file"
    mode: int = 0o644
    content: bytes = b""
    target: str = ""
    uid: int = 0
    gid: int = 0
    mtime_ns: int = EPOCH * 10**9
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


def directory(path: str, mode: int = 0o755, **rest: int) -> Entry:
    """A directory entry; `rest` may hold uid, gid and mtime_ns."""
    return Entry(path, "dir", mode, **rest)  # type: ignore[arg-type]  # only int fields are passed


def whiteout(path: str) -> Entry:
    """The OCI whiteout that hides `path` of the layers below."""
    folder, _, name = path.rpartition("/")
    return Entry(f"{folder}/.wh.{name}" if folder else f".wh.{name}", mode=0o600)


def opaque(path: str) -> Entry:
    """The OCI marker that hides everything the layers below have in directory `path`."""
    return Entry(f"{path}/.wh..wh..opq", mode=0o600)


def capability(*numbers: int) -> bytes:
    """The value of `security.capability` (vfs_cap_data, revision 2), effective."""
    low = high = 0
    for number in numbers:
        if number < 32:
            low |= 1 << number
        else:
            high |= 1 << (number - 32)
    return struct.pack("<IIIII", 0x02000001, low, 0, high, 0)


def access_list(owner: int, group: int, other: int, users: Mapping[int, int]) -> bytes:
    """The value of `system.posix_acl_access`; permissions are 0-7, `users` go by uid."""
    undefined = 0xFFFFFFFF
    mask = group
    for permissions in users.values():
        mask |= permissions
    rows = [(0x01, owner, undefined)]
    rows += [(0x02, permissions, uid) for uid, permissions in sorted(users.items())]
    rows += [(0x04, group, undefined), (0x10, mask, undefined), (0x20, other, undefined)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)


def write_tar(entries: Iterable[Entry], *, ordered: bool = False) -> bytes:
    """The uncompressed tar of `entries`, sorted by path unless `ordered` keeps the given order."""
    listed = list(entries) if ordered else sorted(entries, key=lambda e: os.fsencode(e.path))
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer,
        mode="w",
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as tar:
        for entry in listed:
            tar.addfile(_header(entry), io.BytesIO(entry.content))
    return buffer.getvalue()


def _header(entry: Entry) -> tarfile.TarInfo:
    header = tarfile.TarInfo(entry.path)
    header.type = _KINDS[entry.kind]
    header.mode = entry.mode
    header.uid, header.gid = entry.uid, entry.gid
    header.linkname = entry.target
    header.size = len(entry.content) if entry.kind == "file" else 0
    header.devmajor, header.devminor = entry.device
    seconds, fraction = divmod(entry.mtime_ns, 10**9)
    header.mtime = seconds
    header.pax_headers = {
        f"SCHILY.xattr.{name}": os.fsdecode(value) for name, value in sorted(entry.xattrs.items())
    }
    if fraction:
        # As text: a float would lose the last digits.
        header.pax_headers["mtime"] = f"{seconds}.{fraction:09d}"
    return header
