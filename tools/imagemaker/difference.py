"""The layer that turns one root into the next, as a container builder's snapshotter writes it."""

from __future__ import annotations

import hashlib
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from imagemaker.entries import EPOCH


@dataclass(frozen=True)
class _Facts:
    """What two members of the same path must agree on to be the same."""

    kind: bytes
    mode: int
    owner: tuple[int, int]
    mtime: float
    target: str
    device: tuple[int, int]
    xattrs: tuple[tuple[str, str], ...]
    content: bytes


def write_difference(lower: Path, upper: Path, target: Path) -> None:
    """Writes to `target` the layer over tar `lower` whose result is tar `upper`, sorted by path.

    Parents of what changed come along, a changed hard link brings its whole group, and what is gone
    becomes a whiteout (of the topmost path that is gone).
    """
    with (
        tarfile.open(lower, errors="surrogateescape") as below,
        tarfile.open(upper, errors="surrogateescape") as above,
    ):
        before, after = _facts(below), _facts(above)
        members = {_normal(member.name): member for member in above}
        chosen = _chosen(before, after, members)
        gone = {path for path in before if path not in after}
        with tarfile.open(
            target, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape"
        ) as layer:
            for path in sorted(chosen | gone):
                if path in gone:
                    folder, _, name = path.rpartition("/")
                    # A directory's own whiteout covers all below it.
                    if folder not in gone:
                        layer.addfile(
                            _whiteout(f"{folder}/.wh.{name}" if folder else f".wh.{name}")
                        )
                    continue
                member = members[path]
                member.name = path
                content = above.extractfile(member) if member.isreg() else None
                layer.addfile(_portable(member), content)


def _chosen(
    before: dict[str, _Facts], after: dict[str, _Facts], members: dict[str, tarfile.TarInfo]
) -> set[str]:
    changed = {path for path in after if before.get(path) != after[path]}
    groups: dict[str, set[str]] = defaultdict(set)
    for path, member in members.items():
        if member.islnk():
            groups[_normal(member.linkname)] |= {path, _normal(member.linkname)}
    for group in groups.values():
        if group & changed:
            changed |= group
    for path in [*changed, *(path for path in before if path not in after)]:
        folder = path.rpartition("/")[0]
        while folder:
            if folder in after:
                changed.add(folder)
            folder = folder.rpartition("/")[0]
    return changed


def _facts(tar: tarfile.TarFile) -> dict[str, _Facts]:
    facts: dict[str, _Facts] = {}
    for member in tar:
        path = _normal(member.name)
        if not path:
            continue
        content = b""
        if member.isreg():
            content = _digest(tar, member)
        facts[path] = _Facts(
            member.type,
            member.mode,
            (member.uid, member.gid),
            member.mtime,
            member.linkname,
            (member.devmajor, member.devminor),
            _xattrs(member),
            content,
        )
    return facts


def _digest(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    digest = hashlib.sha256()
    source = tar.extractfile(member)
    while source is not None and (piece := source.read(1 << 20)):
        digest.update(piece)
    return digest.digest()


def _xattrs(member: tarfile.TarInfo) -> tuple[tuple[str, str], ...]:
    prefix = "SCHILY.xattr."
    return tuple(sorted(kv for kv in member.pax_headers.items() if kv[0].startswith(prefix)))


def _portable(member: tarfile.TarInfo) -> tarfile.TarInfo:
    # Only what the layer is to say: tarfile writes path, size and so on again where they need it.
    member.pax_headers = dict(_xattrs(member))
    return member


def _whiteout(path: str) -> tarfile.TarInfo:
    header = tarfile.TarInfo(path)
    header.mode = 0o600
    header.mtime = EPOCH
    return header


def _normal(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))
