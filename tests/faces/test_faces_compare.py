"""compare_trees itself: it finds a planted fault in each attribute, and nothing where none is."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kits.layersdisk import COMPARE, differences, mounted, run
from kits.layersfixtures import sparse_layer
from kits.layersoracle import unpack_layer
from kits.tarlayer import TarLayer

LAYER = (
    TarLayer().directory(b".").file(b"file", b"content" * 1000, mode=0o4755, uid=5, gid=6,
        xattrs={b"user.x": b"1", b"security.capability": b"\1\0\0\2" + bytes(16)})
    .directory(b"dir").symlink(b"link", b"target").device(b"dev", b"3", 5, 70000).fifo(b"fifo")
    .file(b"a", b"l").hardlink(b"b", b"a").file(b"c", b"l").file(b"\xff\nodd", b"x")
).bytes()  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two equal trees on a tmpfs."""
    with mounted("tmpfs", tmp_path / "t", "tmpfs", "size=64m") as base:
        for name in "ab":
            unpack_layer(LAYER, base / name)
        yield base / "a", base / "b"


def retime(path: Path, *, nanoseconds: int) -> None:
    status = path.lstat()
    times = (status.st_atime_ns, status.st_mtime_ns + nanoseconds)
    os.utime(path, ns=times, follow_symlinks=False)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    status = path.lstat()
    path.unlink()
    make(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def overwrite(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"X")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.chmod(0o4755)
    os.setxattr(path, "security.capability", b"\1\0\0\2" + bytes(16))


FAULTS: dict[str, Callable[[Path], object]] = {
    "only in A": lambda t: (t / "fifo").unlink(),
    "only in B": lambda t: (t / "new").write_bytes(b""),
    "file: mode: 4755 / 0755": lambda t: (t / "file").chmod(0o755),
    "dir: uid": lambda t: os.chown(t / "dir", 1, -1),
    "link: gid": lambda t: os.lchown(t / "link", -1, 7),
    "odd: size": lambda t: (t / os.fsdecode(b"\xff\nodd")).write_bytes(b"xy"),
    "file: content": lambda t: overwrite(t / "file"),
    "link: target": lambda t: replace(t / "link", lambda p: p.symlink_to("tarGet")),
    "dev: device: 5:70000 / 5:70001": lambda t: replace(
        t / "dev", lambda p: os.mknod(p, 0o020644, os.makedev(5, 70001))
    ),
    "dev: type": lambda t: replace(
        t / "dev", lambda p: os.mknod(p, 0o060644, os.makedev(5, 70000))
    ),
    "dir: mtime": lambda t: retime(t / "dir", nanoseconds=1),
    "link: mtime": lambda t: retime(t / "link", nanoseconds=1),
    "file: mtime": lambda t: retime(t / "file", nanoseconds=-1),
    "xattr user.x: b'1' / b'2'": lambda t: os.setxattr(t / "file", "user.x", b"2"),
    "xattr security.capability": lambda t: os.removexattr(t / "file", "security.capability"),
    "xattr user.more": lambda t: os.setxattr(t / "dir", "user.more", b""),
    "links: a b / a": lambda t: replace(t / "b", lambda p: p.write_bytes(b"l")),
    "links: c / a b c": lambda t: ((t / "c").unlink(), os.link(t / "a", t / "c")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(fault: str, pair: tuple[Path, Path]) -> None:
    """Each attribute's fault is found and named."""
    a, b = pair
    assert differences(a, b) == ""
    FAULTS[fault](b)
    assert fault in differences(a, b)


def test_planted_hole(tmp_path: Path) -> None:
    """--holes finds a hole that was filled; without it zeros are zeros."""
    with mounted("tmpfs", tmp_path / "t", "tmpfs", "size=64m") as base:
        for name in "ab":
            unpack_layer(sparse_layer().bytes(), base / name)
        assert differences(base / "a", base / "b", "--holes") == ""
        path = base / "b" / "sparse"
        status = path.stat()
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert differences(base / "a", base / "b") == ""
        assert "sparse: holes" in differences(base / "a", base / "b", "--holes")


def test_unreadable_is_not_equal(tmp_path: Path) -> None:
    """A tree that is not there is an error, not an equal one."""
    shutil.rmtree(tmp_path / "none", ignore_errors=True)
    assert "compare_trees:" in run(
        sys.executable, COMPARE, tmp_path / "none", tmp_path / "none", ok=(2,)
    )


def test_it_imports_nothing_of_ours() -> None:
    """The judge stands alone."""
    text = COMPARE.read_text()
    assert not any(
        f"{verb} {package}" in text
        for verb in ("import", "from")
        for package in ("imagecache", "nbdserver", "preload", "cube")
    )
