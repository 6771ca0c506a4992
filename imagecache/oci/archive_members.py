"""The table of contents of a docker archive: where each member's bytes lie in the tar file.

Only headers are read, by seeking from one to the next; member names are keys of a dictionary
and never become paths. `tarfile` decodes single header blocks and does nothing else.
Source: POSIX pax, GNU tar's long names. All functions block and run on worker threads.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imagecache.errors import LimitExceeded, NotFound, Rejected, Unsupported
from imagecache.oci.files import read_range

_BLOCK = 512
_MAX_MEMBERS = 100_000
_MAX_EXTENSION = 1 << 20
_MAX_LINKS = 8
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular member's content: its offset in the archive and its length, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Contents:
    """The members of an archive by name, and the links among them."""

    path: Path
    members: Mapping[str, Member]
    links: Mapping[str, str]

    def find(self, name: str) -> Member:
        """The content under a name, through links inside the archive; raises `NotFound`."""
        key = _normal(name)
        for _ in range(_MAX_LINKS):
            if key is None:
                break
            if key in self.members:
                return self.members[key]
            if key not in self.links:
                break
            key = self.links[key]
        raise NotFound(f"{self.path} has no member {name[:120]!a}")


def read_contents(file: int, path: Path) -> Contents:
    """Walk the headers of an open tar file; raises `Rejected`, `LimitExceeded`, `Unsupported`."""
    total = os.fstat(file).st_size
    _refuse_compressed(os.pread(file, 8, 0), path)
    members: dict[str, Member] = {}
    links: dict[str, str] = {}
    extended: dict[str, str] = {}
    position = count = 0
    while position + _BLOCK <= total:
        block = read_range(file, position, _BLOCK, path)
        if block == bytes(_BLOCK):
            break
        count += 1
        if count > _MAX_MEMBERS:
            raise LimitExceeded(f"{path} has more than {_MAX_MEMBERS} members")
        header = _header(block, path, position)
        position += _BLOCK
        size = int(extended["size"]) if "size" in extended else header.size
        if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
            size = 0
        if not 0 <= size <= total - position:
            raise Rejected(f"{path}: a member at byte {position} runs past the end")
        body = position
        position += -(-size // _BLOCK) * _BLOCK
        if header.type in (b"x", b"L", b"K"):
            if size > _MAX_EXTENSION:
                raise LimitExceeded(f"{path}: an extended header of {size} bytes")
            raw = read_range(file, body, size, path)
            extended |= _pax(raw, path) if header.type == b"x" else _long(header.type, raw)
            continue
        if header.type == b"g":
            continue
        name = _normal(extended.get("path", header.name))
        link = extended.get("linkpath", header.linkname)
        extended = {}
        if name is None:
            continue
        members.pop(name, None)
        links.pop(name, None)
        if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            members[name] = Member(body, size)
        elif header.type == tarfile.LNKTYPE:
            _link(links, name, _normal(link))
        elif header.type == tarfile.SYMTYPE:
            _link(links, name, _normal(f"{name.rpartition('/')[0]}/{link}"))
    if not members:
        raise Rejected(f"{path} is not a docker archive: no file in it")
    return Contents(path, members, links)


def _link(links: dict[str, str], name: str, goal: str | None) -> None:
    if goal is not None:
        links[name] = goal


def _header(block: bytes, path: Path, position: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        raise Rejected(f"{path} is not a tar file (byte {position})") from None
    if header.size < 0:
        raise Rejected(f"{path}: a member of negative size at byte {position}")
    return header


def _refuse_compressed(head: bytes, path: Path) -> None:
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise Unsupported(
                f"{path} is compressed with {name}",
                remedy="decompress it: layers are read in place",
            )


def _long(kind: bytes, raw: bytes) -> dict[str, str]:
    key = "path" if kind == b"L" else "linkpath"
    return {key: raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}


def _pax(raw: bytes, path: Path) -> dict[str, str]:
    """The path, linkpath and size records of a pax extended header."""
    found: dict[str, str] = {}
    while raw:
        digits, space, _ = raw[:12].partition(b" ")
        if not space or not digits.isdigit() or not 4 < int(digits) <= len(raw):
            raise Rejected(f"{path} has a broken pax record")
        record = raw[len(digits) + 1 : int(digits)]
        raw = raw[int(digits) :]
        key, equals, content = record.partition(b"=")
        if not equals or not content.endswith(b"\n"):
            raise Rejected(f"{path} has a broken pax record")
        content = content[:-1]
        if key == b"size":
            if not content.isdigit() or len(content) > 19:
                raise Rejected(f"{path} has a pax size that is not a number")
            found["size"] = content.decode("ascii")
        elif key in (b"path", b"linkpath"):
            found[key.decode("ascii")] = content.decode("utf-8", "surrogateescape")
    return found


def _normal(name: str) -> str | None:
    """A member's name without empty and dot parts; None if it climbs above the root."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) or None
