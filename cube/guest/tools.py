"""The tools disk: programs that the agent runs in a guest beside the image's own, as EROFS.

It holds s3fs with its libraries, from the distribution's packages, downloaded and unpacked, never
installed. It is made on first use and kept in the guest cache; `tools-LAYOUT-MACHINE.erofs` is
complete when its name exists.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from cube.guest.packages import Downloader, machine, unpack
from imagecache.errors import NotFound, Unavailable, Unsupported

LAYOUT: Final = 2  # raise it when the disk's contents change
_PROGRAM: Final = "s3fs"
_DEADLINE_SECONDS: Final = 120
# What a program loads when it runs: everything else of the packages stays behind.
_KEPT: Final = ("bin", "sbin", "lib", "lib64", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc")
# Programs that packages name beside libraries (debconf, perl) have no part in a mount.
_LIBRARY: Final = re.compile(r"lib(?!perl|pam|.*-perl$)|zlib1g$")
_CERTIFICATES: Final = Path("/etc/ssl/certs/ca-certificates.crt")


def tools_path(cache: Path) -> Path:
    """Where the disk is, or will be."""
    return cache / f"tools-{LAYOUT}-{machine()}.erofs"


def make_tools(cache: Path) -> Path:
    """The disk's path, made if it is missing; the caller holds the cache's lock. Blocking.

    Raises NotFound, Unavailable, Unsupported, NoSpace, Denied.
    """
    target = tools_path(cache)
    if target.is_file():
        return target
    if shutil.which("mkfs.erofs") is None:
        raise Unsupported(
            "the tools disk cannot be made: no mkfs.erofs", remedy="apt-get install erofs-utils"
        )
    with tempfile.TemporaryDirectory(prefix="tools-", dir=cache) as name:
        work = Path(name)
        downloader = Downloader(work)
        libraries = [part for part in downloader.closure(_PROGRAM) if _LIBRARY.match(part)]
        tree, root = work / "tree", work / "root"
        for package in downloader.fetch([_PROGRAM, *libraries]):
            unpack(package, tree)
        if not (tree / "usr/bin" / _PROGRAM).is_file():
            raise NotFound(f"the package {_PROGRAM} holds no program of that name")
        for directory in ("dev", "proc", "run", "mnt", "tmp", "etc"):
            (root / directory).mkdir(parents=True)
        for kept in _KEPT:
            _take(tree / kept, root / kept)
        if _CERTIFICATES.is_file():
            certificates = root / "etc/ssl/certs"
            certificates.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_CERTIFICATES, certificates / _CERTIFICATES.name)
        fresh = work / "tools.erofs"
        _make_image(root, fresh)
        fresh.replace(target)
    for old in cache.glob("tools-*.erofs"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def _take(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.readlink())
    elif source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)


def _make_image(root: Path, image: Path) -> None:
    try:
        result = subprocess.run(
            ["mkfs.erofs", "--quiet", "-zlz4", "-T0", "--all-root", str(image), str(root)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_DEADLINE_SECONDS,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"mkfs.erofs did not finish in {_DEADLINE_SECONDS} seconds") from error
    if result.returncode != 0:
        raise Unavailable(f"the tools disk cannot be made: {result.stderr.strip()[-200:]}")
