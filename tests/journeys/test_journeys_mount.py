"""The mounted export equals what independent unpackers make of the same layers."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kits.image import recipe_layout, reference
from kits.image_oracle import differences, overlay_of, umoci_tree
from kits.journey import Cubecache, tool
from testbed.processes import Stage


def same_trees(truth: Path, ours: Path) -> list[str]:
    """All differences but those of the root directory's time, which no layer says."""
    roots = [(found.st_mode, found.st_uid, found.st_gid) for found in (truth.stat(), ours.stat())]
    assert roots[0] == roots[1]
    return differences(truth, ours, "--skip", ".", "--limit", "20")


@contextmanager
def mounted(cubecache: Cubecache, image: str, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    cubecache.run("mount", image, str(folder))
    try:
        yield folder
    finally:
        cubecache.run("umount", str(folder))
    assert not list(folder.iterdir())


@contextmanager
def mounted_by_nbdfuse(uri: str, stage: Stage) -> Iterator[Path]:
    """An EROFS mount by hand: nbdfuse and the kernel, with none of our code on the way."""
    folder, point = stage.folder / "fuse", stage.folder / "erofs"
    folder.mkdir()
    point.mkdir()
    process = stage.start(["nbdfuse", "-r", str(folder / "disk"), uri])
    process.wait_until((folder / "disk").exists)
    subprocess.run(
        ["mount", "-t", "erofs", "-o", "ro,loop", str(folder / "disk"), str(point)], check=True
    )
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)
        subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.parametrize("recipe", ["python-numpy", "nginx", "postgresql", "static-busybox"])
def test_a_mounted_image_equals_overlayfs_over_its_unpacked_layers(
    new_cubecache: Callable[..., Cubecache], tmp_path: Path, recipe: str
) -> None:
    """Trees, contents, modes, owners, xattrs, link groups and mtimes: no difference."""
    layout = recipe_layout(recipe)
    cubecache = new_cubecache()
    with (
        overlay_of(layout, tmp_path) as truth,
        mounted(cubecache, reference(layout), tmp_path / "mounted") as ours,
    ):
        assert same_trees(truth, ours) == []


def test_an_export_mounted_by_nbdfuse_and_the_kernel_is_the_same(
    cubecache: Cubecache, busybox: str, stage: Stage, tmp_path: Path
) -> None:
    daemon = cubecache.serve()
    uri = daemon.export(busybox)
    layout = recipe_layout("static-busybox")
    with overlay_of(layout, tmp_path) as truth, mounted_by_nbdfuse(uri, stage) as ours:
        assert same_trees(truth, ours) == []
    assert daemon.stop() == 0


def test_umoci_agrees(cubecache: Cubecache, tmp_path: Path) -> None:
    """A second oracle of another make, on real content."""
    layout = recipe_layout("nginx")
    truth = umoci_tree(layout, tmp_path)
    with mounted(cubecache, reference(layout), tmp_path / "mounted") as ours:
        # umoci sets directories' times while it unpacks later layers into them.
        assert differences(truth, ours, "--no-directory-mtimes", "--limit", "20") == []


def test_umount_of_what_is_not_mounted_is_an_error(cubecache: Cubecache, tmp_path: Path) -> None:
    assert cubecache.run("umount", str(tmp_path), expect=None).code not in (0, 1, 70)


def test_a_mount_leaves_nothing_behind(cubecache: Cubecache, busybox: str, tmp_path: Path) -> None:
    with mounted(cubecache, busybox, tmp_path / "mounted") as ours:
        assert (ours / "hello.sh").read_bytes().startswith(b"#!/bin/sh")
        with pytest.raises(OSError, match="Read-only"):
            (ours / "new").write_text("x")
    # The FUSE server and the mount's own daemon end just after the mount has.
    for _ in range(150):
        left = tool("pgrep", "--list-full", "--full", str(cubecache.state), expect=None).out
        if not left:
            break
        time.sleep(0.1)
    assert not left
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_a_state_directory_is_free_again_when_umount_returns(
    cubecache: Cubecache, busybox: str, tmp_path: Path
) -> None:
    """The daemon that a mount brought has ended by then; the next mount brings its own."""
    for number in range(3):
        with mounted(cubecache, busybox, tmp_path / f"mounted-{number}") as ours:
            assert (ours / "hello.sh").exists()
        left = tool("pgrep", "--list-full", "--full", f"{cubecache.state}.* serve", expect=None).out
        assert not left
