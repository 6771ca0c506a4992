"""Rules for names in a layer: normal form, whiteout prefixes, and caps."""

from __future__ import annotations

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten.kinds import shown
from imagecache.flatten.limits import Limits

WHITEOUT_PREFIX = b".wh."
OPAQUE_MARK = b".wh..wh..opq"
AUFS_PREFIX = b".wh..wh."  # aufs's own bookkeeping, but for the opaque mark


def split_path(raw: bytes, limits: Limits, where: str) -> list[bytes]:
    """The components of a member's name inside the root; [] for the root itself.

    Empty and "." components vanish, ".." takes one component back as written (no symlink is
    followed here). Raises `Rejected` where ".." climbs above the root, `LimitExceeded` over caps.
    """
    parts = raw.split(b"/")
    if b"" in parts or b"." in parts or b".." in parts:
        kept: list[bytes] = []
        for part in parts:
            if part == b"..":
                if not kept:
                    raise Rejected(f"{where}: path {shown(raw)} climbs out of the root")
                kept.pop()
            elif part not in (b"", b"."):
                kept.append(part)
        parts = kept
    if len(raw) > limits.path_bytes and sum(map(len, parts)) + len(parts) > limits.path_bytes + 1:
        raise LimitExceeded(
            f"{where}: path {shown(raw)} is longer than {limits.path_bytes} bytes",
            remedy="no Linux can open such a path",
        )
    if len(parts) > limits.depth:
        raise LimitExceeded(f"{where}: path {shown(raw)} is deeper than {limits.depth}")
    if len(raw) > limits.name_bytes:
        for part in parts:
            if len(part) > limits.name_bytes:
                raise LimitExceeded(
                    f"{where}: name {shown(part)} is longer than {limits.name_bytes} bytes"
                )
    return parts


def whiteout_target(parts: list[bytes], raw: bytes, where: str) -> tuple[str, bytes] | None:
    """What a path with a `.wh.` component means, or None for an ordinary one.

    ("whiteout", hidden path), ("opaque", directory path) or ("ignored", b"") for aufs's own
    files. Raises `Rejected` for an empty, "." or ".." name and for files below a whiteout.
    """
    for index, part in enumerate(parts):
        if not part.startswith(WHITEOUT_PREFIX):
            continue
        above = b"/".join(parts[:index])
        is_last = index == len(parts) - 1
        if part == OPAQUE_MARK and is_last:
            return "opaque", above
        if part.startswith(AUFS_PREFIX):
            return "ignored", b""
        if not is_last:
            raise Rejected(f"{where}: path {shown(raw)} lies below a whiteout")
        name = part[len(WHITEOUT_PREFIX) :]
        if name in (b"", b".", b".."):
            raise Rejected(f"{where}: {shown(raw)} is a whiteout without a name")
        return "whiteout", above + b"/" + name if above else name
    return None
