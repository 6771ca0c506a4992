"""Disks of the host that volumes need: EmptyDirs, and claims that outlive their pods. Blocking.

Both are sparse raw files with ext4, made by mke2fs. A claim's file is STATE/volumes/CLAIM.img.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from cube.keeper.guestplan import DiskWish
from imagecache.errors import NoSpace, Unavailable, Unsupported

EMPTY_BYTES: Final = 4 << 30  # of an EmptyDir without a sizeLimit
CLAIM_BYTES: Final = 10 << 30  # of a claim without a size
SMALLEST_BYTES: Final = 1 << 20  # mke2fs makes nothing below
_MAKE_SECONDS: Final = 120


def claim_path(state: Path, claim: str) -> Path:
    """Where a claim's disk is kept."""
    return state / "volumes" / f"{claim}.img"


def claim_socket(state: Path, claim: str) -> Path | None:
    """Where another process serves the claim over vhost-user, if one does: beside its disk."""
    path = claim_path(state, claim).with_suffix(".sock")
    return path if path.is_socket() else None


def provide_disk(state: Path, directory: Path, wish: DiskWish, *, first: bool) -> Path:
    """The wished disk's file, made where it is missing; `first` where a forced format is due.

    Raises NoSpace, Unsupported, Unavailable.
    """
    if wish.claim:
        path = claim_path(state, wish.claim)
        if path.exists() and not (wish.format and first):
            return path
        _make(path, wish.size_bytes or CLAIM_BYTES, journal=True)
        return path
    path = directory / f"{wish.serial}.img"
    if not path.exists():
        # What dies with the pod needs no journal.
        _make(path, wish.size_bytes or EMPTY_BYTES, journal=False)
    return path


def _make(path: Path, size: int, *, journal: bool) -> None:
    program = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        raise Unsupported("this host has no mke2fs", remedy="apt-get install e2fsprogs")
    fresh = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with fresh.open("wb") as file:
            fresh.chmod(0o600)
            file.truncate(max(size, SMALLEST_BYTES))
        features = "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,nodiscard"
        command = [program, "-q", "-F", "-t", "ext4", "-m", "0", "-E", features]
        command += [] if journal else ["-O", "^has_journal"]
        done = subprocess.run(
            [*command, str(fresh)],
            capture_output=True,
            text=True,
            timeout=_MAKE_SECONDS,
            check=False,
        )
        if done.returncode:
            raise Unavailable(f"mke2fs of {path.name} failed: {done.stderr.strip()[:400]}")
        fresh.replace(path)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"mke2fs of {path.name} hung") from error
    except OSError as error:
        raise NoSpace(f"disk {path} cannot be made: {error.strerror}") from error
    finally:
        fresh.unlink(missing_ok=True)
