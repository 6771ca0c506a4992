"""The ext4 face: e2fsck, the kernel read-only and read-write, and independent unpackings."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
from kits.layersdisk import BLOCK, differences, flatten, mounted, run, write_disk
from kits.layersfixtures import (
    debian_layer,
    every_kind,
    large_directories,
    sparse_layer,
    two_versions,
)
from kits.layersoracle import overlay_of, umoci_of
from kits.tarlayer import TarLayer, header, pax

from imagecache.errors import LimitExceeded
from imagecache.faces.erofs import write_erofs
from imagecache.faces.ext4 import write_ext4
from imagecache.faces.ext4_directories import HASH_SEED, name_hash
from imagecache.faces.ext4_inodes import pack_time
from imagecache.flatten.filetable import region_layout

LOST_FOUND = ("--skip", "lost+found")


def make_disk(layers: Sequence[bytes], target: Path, *, free_blocks: int = 0) -> Path:
    tree, contents = flatten(*layers)
    write_disk(target, write_ext4(tree, free_blocks=free_blocks), tree, contents)
    run("e2fsck", "-fn", target)
    return target


CASES = {
    "every kind": [every_kind().bytes()],
    "sparse": [sparse_layer().bytes()],
    "directories": [large_directories().bytes()],
    "versions": two_versions(),
    "all": [every_kind().bytes(), large_directories().bytes(), *two_versions()],
    "nothing": [TarLayer().directory(b".").bytes()],
}


@pytest.mark.parametrize("free_blocks", [0, 50_000])
@pytest.mark.parametrize("case", CASES)
def test_like_overlayfs(case: str, free_blocks: int, tmp_path: Path) -> None:
    """D6, section 3: e2fsck is content, and the kernel shows what overlayfs shows."""
    disk = make_disk(CASES[case], tmp_path / "disk", free_blocks=free_blocks)
    with (
        overlay_of(CASES[case], tmp_path) as expected,
        mounted(disk, tmp_path / "ext4", "ext4") as ours,
    ):
        assert differences(expected, ours, *LOST_FOUND) == ""
        assert (ours / "lost+found").stat().st_mode & 0o7777 == 0o700


def test_read_write(tmp_path: Path) -> None:
    """A guest writes: fills the free space, deletes, renames, grows directories, changes
    attributes; e2fsck is content after it, and what was not touched is as it was."""
    layers = [every_kind().bytes(), large_directories().bytes(), *two_versions()]
    disk = make_disk(layers, tmp_path / "disk", free_blocks=20_000)
    with mounted(disk, tmp_path / "ext4", "ext4", "loop,rw") as ours:
        free = os.statvfs(ours).f_bavail
        assert free > 20_000
        with pytest.raises(OSError, match="No space"), (ours / "fill").open("wb") as file:
            while True:
                file.write(b"f" * (1 << 20))
        (ours / "fill").unlink()
        for number in range(1500):
            (ours / "big" / f"new-{number}").write_bytes(b"n")
        for number in range(0, 3000, 3):
            (ours / "big" / f"file-{number}").unlink()
        shutil.rmtree(ours / "subs")
        shutil.rmtree(ours / "names")
        (ours / "sizes" / "70000").rename(ours / "moved")
        with (ours / "moved").open("ab") as file:
            file.write(b"more" * 10_000)
        os.setxattr(ours / "x" / "large", "user.large", b"small now")
        os.setxattr(ours / "x" / "empty", "user.grown", b"g" * 1000)
        os.truncate(ours / "sizes" / "1000003", 5)
    run("e2fsck", "-fn", disk)
    with (
        overlay_of(layers, tmp_path) as expected,
        mounted(disk, tmp_path / "ext4", "ext4") as ours,
    ):
        skipped = [b"big", b"subs", b"names", b"moved", b"sizes", b"x/large", b"x/empty"]
        skip = [word for name in skipped for word in ("--skip", os.fsdecode(name))]
        found = differences(expected, ours, *LOST_FOUND, *skip)
        assert [line for line in found.splitlines() if not line.startswith(".: mtime")] == []
        assert (ours / "moved").stat().st_size == 70_000 + 40_000


def test_real_content(tmp_path: Path) -> None:
    """Real Debian files in two layers."""
    lower = debian_layer(["usr/share/doc", "usr/lib/python3", "etc"])
    upper = (
        TarLayer().directory(b".").directory(b"usr").directory(b"usr/share")
        .directory(b"usr/share/doc").opaque(b"usr/share/doc").file(b"usr/share/doc/README", b"new")
        .directory(b"etc").whiteout(b"etc/shadow")
    ).bytes()  # fmt: skip
    disk = make_disk([lower, upper], tmp_path / "disk")
    with (
        overlay_of([lower, upper], tmp_path) as expected,
        mounted(disk, tmp_path / "ext4", "ext4") as ours,
    ):
        assert differences(expected, ours, *LOST_FOUND) == ""


def test_links_across_layers(tmp_path: Path) -> None:
    """C14: names that upper layers give to lower files."""
    layers = [
        TarLayer().directory(b".").directory(b"d").file(b"d/a", b"content", uid=7).bytes(),
        TarLayer().hardlink(b"link", b"d/a").hardlink(b"link2", b"d/a").whiteout(b"d/a").bytes(),
    ]
    disk = make_disk(layers, tmp_path / "disk")
    with umoci_of(layers, tmp_path) as expected, mounted(disk, tmp_path / "e", "ext4") as ours:
        assert differences(expected, ours, "--no-directory-mtimes", *LOST_FOUND) == ""


def test_dead_data_is_free(tmp_path: Path) -> None:
    """Blocks that only hidden files use are free, those of live files are not."""
    lower = TarLayer().directory(b".").file(b"dead", b"d" * 40_960).file(b"live", b"l" * 40_960)
    layers = [lower.bytes(), TarLayer().whiteout(b"dead").bytes()]
    tree, _ = flatten(*layers)
    region = write_ext4(tree)
    layout = region_layout(tree.tables[0])
    disk = make_disk(layers, tmp_path / "disk")
    start = region.plan.layer_start_blocks[0]
    for ordinal, wanted in ((0, "not in use"), (1, "marked in use")):
        block = start + layout.start_blocks[ordinal]
        text = run("debugfs", "-R", f"testb {block} {layout.blocks[ordinal]}", disk)
        assert text.count(wanted) == 10


def test_same_data_chunks_as_erofs() -> None:
    """Both faces name the same regions at the same addresses while one window holds both."""
    tree, _ = flatten(every_kind().bytes(), *two_versions())
    assert write_ext4(tree).plan.layer_start_blocks == write_erofs(tree).plan.layer_start_blocks


def test_own_lost_found(tmp_path: Path) -> None:
    """An image's own lost+found stays as it is."""
    layer = TarLayer().directory(b".").directory(b"lost+found", mode=0o711).file(b"lost+found/x")
    disk = make_disk([layer.bytes()], tmp_path / "disk")
    with (
        overlay_of([layer.bytes()], tmp_path) as expected,
        mounted(disk, tmp_path / "ext4", "ext4") as ours,
    ):
        assert differences(expected, ours) == ""


def test_long_files(tmp_path: Path) -> None:
    """Files of many extents: 1.5 GB in one leaf, and 50 GB of holes across 400 groups."""
    layer = TarLayer().directory(b".")
    for name, size in ((b"leaf", 1_500_000_000), (b"tree", 50 << 30)):
        records = {
            b"GNU.sparse.size": b"%d" % size,
            b"GNU.sparse.numblocks": b"2",
            b"GNU.sparse.map": b"0,512,%d,512" % (size // 512 * 512 - 512),
        }
        layer.raw(pax(records) + header(name, size=1024) + b"A" * 512 + b"Z" * 512)
    disk = make_disk([layer.bytes()], tmp_path / "disk")
    with mounted(disk, tmp_path / "ext4", "ext4") as ours:
        for name, size in (("leaf", 1_500_000_000), ("tree", 50 << 30)):
            with (ours / name).open("rb") as file:
                assert os.fstat(file.fileno()).st_size == size
                assert os.pread(file.fileno(), 512, 0) == b"A" * 512
                assert os.pread(file.fileno(), 512, size // 512 * 512 - 512) == b"Z" * 512
                assert os.pread(file.fileno(), 4096, size // 2) == bytes(4096)


def test_many_inodes_raise_the_disk(tmp_path: Path) -> None:
    """More inodes than the data's groups hold: the disk grows, by holes."""
    layer = TarLayer().directory(b".")
    for number in range(40_000):
        layer.file(b"d%d/f%d" % (number % 50, number))
    for number in range(50):
        layer.directory(b"d%d" % number)
    disk = make_disk([layer.bytes()], tmp_path / "disk")
    assert disk.stat().st_size == 2 * 32768 * BLOCK
    with mounted(disk, tmp_path / "ext4", "ext4") as ours:
        assert sum(len(list((ours / f"d{number}").iterdir())) for number in range(50)) == 40_000
        for number in range(0, 40_000, 997):
            assert (ours / f"d{number % 50}" / f"f{number}").exists()


def test_shared_attribute_blocks(tmp_path: Path) -> None:
    """Thousands of files with one large attribute set share blocks of 1,024 references."""
    layer = TarLayer().directory(b".")
    for number in range(2500):
        layer.file(b"f%d" % number, b"", xattrs={b"user.same": b"s" * 500})
    disk = make_disk([layer.bytes()], tmp_path / "disk", free_blocks=5000)
    with mounted(disk, tmp_path / "ext4", "ext4", "loop,rw") as ours:
        assert os.getxattr(ours / "f2499", "user.same") == b"s" * 500
        for number in range(0, 2500, 10):
            os.setxattr(ours / f"f{number}", "user.same", b"o" * 600)
        assert os.getxattr(ours / "f2499", "user.same") == b"s" * 500
    run("e2fsck", "-fn", disk)


@pytest.mark.quick
def test_what_ext4_cannot_hold() -> None:
    """C34: attributes beyond a block, and over 65,000 names, are refused by name."""
    large = TarLayer().file(b"dir/much", b"", xattrs={b"user.big": b"b" * 5000})
    with pytest.raises(LimitExceeded, match=r"dir/much.*'big' with 5000 bytes"):
        write_ext4(flatten(large.bytes())[0])
    links = TarLayer().file(b"0")
    for number in range(1, 65_001):
        links.hardlink(b"%d" % number, b"0")
    with pytest.raises(LimitExceeded, match="65001 names"):
        write_ext4(flatten(links.bytes())[0])


def test_attributes_up_to_the_block(tmp_path: Path) -> None:
    """C34: sets that just fit: in the inode, in the block, and in both together."""
    layer = TarLayer().directory(b".")
    for size in (0, 1, 60, 64, 68, 72, 76, 80, 3000, 4000, 4036, 4040):
        layer.file(b"s%d" % size, b"", xattrs={b"user.v": b"x" * size})
        layer.directory(b"d%d" % size, xattrs={b"user.v": b"x" * size})
    layer.file(b"both", b"", xattrs={b"user.v": b"x" * 4036, b"user.w": b"y" * 40})
    disk = make_disk([layer.bytes()], tmp_path / "disk")
    with (
        overlay_of([layer.bytes()], tmp_path) as expected,
        mounted(disk, tmp_path / "ext4", "ext4") as ours,
    ):
        assert differences(expected, ours, *LOST_FOUND) == ""


@pytest.mark.quick
def test_times_are_clamped() -> None:
    """C33: times outside 1901-2446 become the nearest that ext4 holds, without nanoseconds."""
    assert pack_time(-(1 << 31), 0) == (0x80000000, 0)
    assert pack_time(-(1 << 40), 5) == (0x80000000, 0)
    assert pack_time(-1, 999) == (0xFFFFFFFF, 999 << 2)
    assert pack_time(1 << 31, 1) == (0x80000000, 1 << 2 | 1)
    top = (1 << 31) - 1 + (3 << 32)
    assert pack_time(top, 7) == pack_time(1 << 60, 7) == (0x7FFFFFFF, 3)


def test_directory_hash_like_debugfs() -> None:
    """The hash of names is e2fsprogs' own."""
    seed = str(uuid.UUID(bytes=HASH_SEED))
    for length in (1, 2, 3, 4, 5, 15, 31, 32, 33, 63, 64, 65, 128, 255):
        name = (f"name-{length}-" * 60)[:length]
        text = run("debugfs", "-R", f"dx_hash -h half_md4 -s {seed} {name}")
        major, minor = name_hash(name.encode())
        assert f"is 0x{major:x} (minor 0x{minor:x})" in text


def test_two_level_tree(tmp_path: Path) -> None:
    """Directories whose index needs nodes (long names: few to a block)."""
    layer = TarLayer().directory(b".")
    for number in range(9000):
        layer.symlink(b"d/" + b"%05d" % number + b"n" * 250, b"t")
    disk = make_disk([layer.directory(b"d").bytes()], tmp_path / "disk", free_blocks=9000)
    with mounted(disk, tmp_path / "ext4", "ext4", "loop,rw") as ours:
        assert len(os.listdir(ours / "d")) == 9000
        for number in range(0, 9000, 100):
            assert os.readlink(ours / "d" / f"{number:05d}{'n' * 250}") == "t"
            (ours / "d" / f"{number:05d}m").touch()
    run("e2fsck", "-fn", disk)


def test_preen_keeps_the_image(tmp_path: Path) -> None:
    """e2fsck -fp finds nothing to mend: it changes its own superblock notes alone."""
    disk = make_disk([every_kind().bytes(), large_directories().bytes()], tmp_path / "disk")
    before = disk.read_bytes()
    subprocess.run(["e2fsck", "-fp", disk], check=True, stdout=subprocess.DEVNULL)
    after = disk.read_bytes()
    assert before[:1024] == after[:1024]
    assert before[2048:] == after[2048:]
