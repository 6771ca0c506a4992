"""The EROFS face under the kernel: mounted and compared with independent unpackings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from kits.layersdisk import differences, flatten, mounted, run, write_disk
from kits.layersfixtures import (
    debian_layer,
    every_kind,
    large_directories,
    sparse_layer,
    two_versions,
)
from kits.layersoracle import overlay_of, umoci_of
from kits.tarlayer import TarLayer

from imagecache.faces.erofs import write_erofs


def make_disk(layers: Sequence[bytes], target: Path) -> Path:
    tree, contents = flatten(*layers)
    write_disk(target, write_erofs(tree), tree, contents)
    assert "<E>" not in run("fsck.erofs", target)
    return target


def assert_like_overlayfs(layers: Sequence[bytes], tmp_path: Path, *options: str) -> None:
    disk = make_disk(layers, tmp_path / "disk")
    with (
        overlay_of(layers, tmp_path) as expected,
        mounted(disk, tmp_path / "erofs", "erofs") as ours,
    ):
        assert differences(expected, ours, *options) == ""


CASES = {
    "every kind": [every_kind().bytes()],
    "sparse": [sparse_layer().bytes()],
    "directories": [large_directories().bytes()],
    "versions": two_versions(),
    "all": [every_kind().bytes(), large_directories().bytes(), *two_versions()],
}


@pytest.mark.parametrize("case", CASES)
def test_like_overlayfs(case: str, tmp_path: Path) -> None:
    """C20, C25, C30-C35, section 3: the kernel shows what overlayfs shows, in every attribute."""
    assert_like_overlayfs(CASES[case], tmp_path)


def test_real_content(tmp_path: Path) -> None:
    """Real Debian files in two layers, the upper one hiding and replacing some."""
    lower = debian_layer(["usr/share/doc", "usr/lib/python3", "etc", "usr/bin"])
    upper = (
        TarLayer().directory(b".").directory(b"usr").directory(b"usr/share").directory(b"usr/share/doc")
        .opaque(b"usr/share/doc").file(b"usr/share/doc/README", b"new")
        .directory(b"etc").file(b"etc/passwd", b"root:x:0:0::/:/bin/sh\n").whiteout(b"etc/shadow")
    )  # fmt: skip
    assert_like_overlayfs([lower, upper.bytes()], tmp_path)


def test_links_across_layers_like_umoci(tmp_path: Path) -> None:
    """C14, C15: hard links to lower layers, their targets deleted or replaced later."""
    layers = [
        TarLayer().directory(b".").directory(b"d").file(b"d/a", b"content", uid=7, mode=0o640)
        .file(b"b", b"other").hardlink(b"b2", b"b").symlink(b"s", b"d/a").bytes(),
        TarLayer().hardlink(b"link", b"d/a").hardlink(b"s2", b"s").hardlink(b"b3", b"b2").bytes(),
        TarLayer().whiteout(b"d/a").hardlink(b"link2", b"link").file(b"b", b"replaced").bytes(),
    ]  # fmt: skip
    disk = make_disk(layers, tmp_path / "disk")
    with (
        umoci_of(layers, tmp_path) as expected,
        mounted(disk, tmp_path / "erofs", "erofs") as ours,
    ):
        # umoci gives a directory that it changes the time of the change.
        assert differences(expected, ours, "--no-directory-mtimes") == ""
        assert (ours / "link").stat().st_nlink == 2
        assert (ours / "b2").stat().st_nlink == 2


def test_every_kind_like_umoci(tmp_path: Path) -> None:
    """A second judge for all kinds and attributes of one layer."""
    layers = [every_kind().bytes(), *two_versions()[1:]]
    disk = make_disk(layers, tmp_path / "disk")
    with (
        umoci_of(layers, tmp_path) as expected,
        mounted(disk, tmp_path / "erofs", "erofs") as ours,
    ):
        # Go's tar reader takes an empty pax value for none, and so drops an empty attribute.
        options = ("--no-directory-mtimes", "--ignore-xattr", "user.empty")
        assert differences(expected, ours, *options) == ""


def test_many_links(tmp_path: Path) -> None:
    """Section 3: more than 65,535 names of one file."""
    layer = TarLayer().directory(b".").file(b"d/0", b"x", mtime=0).directory(b"d")
    for number in range(1, 66_000):
        layer.hardlink(b"d/%d" % number, b"d/0")
    disk = make_disk([layer.bytes()], tmp_path / "disk")
    with mounted(disk, tmp_path / "erofs", "erofs") as ours:
        assert (ours / "d/65999").stat().st_nlink == 66_000
        assert len(list((ours / "d").iterdir())) == 66_000


def test_root_forms(tmp_path: Path) -> None:
    """The root inode stays in block 0 with large attributes, and with many names."""
    wide = TarLayer().directory(b".", xattrs={b"user.v": b"v" * 5000})
    for number in range(500):
        wide.file(b"name-%d" % number, b"x")
    some = TarLayer().directory(b".", xattrs={b"user.v": b"v" * 2500, b"trusted.w": b"w"})
    for number in range(60):
        some.file(b"name-%d" % number, b"x")
    for number, layer in enumerate((wide, some, TarLayer().directory(b".", mtime=0))):
        place = tmp_path / str(number)
        place.mkdir()
        assert_like_overlayfs([layer.bytes()], place)


def test_large_xattrs(tmp_path: Path) -> None:
    """C34: attributes that fill several blocks of an inode are read back."""
    layer = TarLayer().directory(b".")
    for size in (3900, 4000, 4020, 4096, 30_000, 65_535):
        layer.file(b"f%d" % size, b"x", xattrs={b"user.v": bytes([size % 251]) * size})
        layer.directory(b"d%d" % size, xattrs={b"user.v": b"x" * size})
        layer.file(b"d%d/child" % size)
        layer.symlink(b"l%d" % size, b"t" * 90, xattrs={b"trusted.v": b"l" * size})
    for size in (3900, 4000, 4020, 4096, 30_000, 65_535):
        layer.directory(b"d%d" % size, xattrs={b"user.v": b"x" * size})
    assert_like_overlayfs([layer.bytes()], tmp_path)


def test_epoch_files_are_compact(tmp_path: Path) -> None:
    """Files modified at the epoch take 32 bytes, and read as they should."""
    layer = TarLayer().directory(b".", mtime=0)
    for number in range(300):
        layer.file(b"%d" % number, b"c", mtime=0, uid=65535, gid=number)
    layer.file(b"large-id", b"c", mtime=0, uid=65536).symlink(b"l", b"t" * 70, mtime=0)
    layer.device(b"dev", b"4", 8, 300, mtime=0)
    tree, _ = flatten(layer.bytes())
    assert len(write_erofs(tree).sections[1].rstrip(b"\0")) <= 3 * 4096
    assert_like_overlayfs([layer.bytes()], tmp_path)
