"""A folder on disk as a layer: every owner root, every mtime the same."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from imagemaker.entries import EPOCH


def write_tree(folder: Path, prefix: str, target: Path) -> None:
    """Writes `folder` to tar `target` below `prefix` (no leading slash), sorted by path."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        parts = prefix.split("/")
        for depth in range(1, len(parts) + 1):
            header = tarfile.TarInfo("/".join(parts[:depth]))
            header.type, header.mode, header.mtime = tarfile.DIRTYPE, 0o755, EPOCH
            tar.addfile(header)
        for path in sorted(folder.rglob("*"), key=os.fsencode):
            header = tar.gettarinfo(path, f"{prefix}/{path.relative_to(folder)}")
            header.uid = header.gid = 0
            header.uname = header.gname = ""
            header.mtime = EPOCH
            if header.isreg():
                with path.open("rb") as source:
                    tar.addfile(header, source)
            else:
                tar.addfile(header)
