"""The spool: where a build keeps blobs and worker output, under one builder's lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imagecache.errors import Busy, Denied, NoSpace

# Packs, small files and slack stand beside the blob while one layer is converted.
ROOM_FACTOR = 3


@dataclass(frozen=True, slots=True)
class Spool:
    """Paths below one directory; every call is blocking."""

    root: Path

    @property
    def blobs(self) -> Path:
        """Blobs as the registry has them, and `.partial` ones that a later build resumes."""
        return self.root / "blobs"

    @property
    def work(self) -> Path:
        """Output of workers; nothing in it outlives its build."""
        return self.root / "work"

    def blob(self, digest: str) -> Path:
        """Where a verified blob stands."""
        return self.blobs / digest.replace(":", "-")

    def prepare(self, keep: set[str]) -> None:
        """Makes the directories, and drops what earlier builds left but blobs in `keep`."""
        self.blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(mode=0o700)
        kept = {digest.replace(":", "-") for digest in keep}
        for path in self.blobs.iterdir():
            if path.name.removesuffix(".partial") not in kept:
                path.unlink()

    def directory(self, name: str) -> Path:
        """A fresh output directory for one worker."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        return path

    def require_room(self, blob_bytes: int) -> None:
        """NoSpace unless the largest blob can be downloaded and converted here."""
        free = shutil.disk_usage(self.root).free
        if free < blob_bytes * ROOM_FACTOR:
            raise NoSpace(
                f"{self.root} has {free >> 20} MiB free; a layer of {blob_bytes >> 20} MiB needs "
                f"about {blob_bytes * ROOM_FACTOR >> 20}",
                remedy="free space, or set --state-dir to a larger disk",
            )


@contextlib.contextmanager
def builder_lock(path: Path) -> Iterator[None]:
    """Holds the one-builder-at-a-time lock of a state directory; Busy names the holder's pid."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except PermissionError as error:
        raise Denied(f"cannot open {path}", remedy="run as the state directory's owner") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            raise Busy(
                f"another build is running on this state directory (pid {holder})",
                remedy="wait for it, or use another --state-dir",
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
