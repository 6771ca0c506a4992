"""Every real image, in both faces, against overlayfs over its separately unpacked layers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from imagemaker.recipes import RECIPES
from kits.image import recipe_layout, reference
from kits.image_oracle import differences, overlay_of
from kits.journey import Cubecache

# The root's own time and a fresh ext4's lost+found are in no layer.
SKIPPED = ("--skip", ".", "--skip", "lost+found", "--limit", "20")


def compare_both_faces(cubecache: Cubecache, recipe: str, scratch: Path) -> None:
    layout = recipe_layout(recipe)
    image = reference(layout)
    built = [
        cubecache.run("preload", image, *face, "--json").json()
        for face in ((), ("--fs", "ext4"), ("--fs", "ext4", "--free", "1GiB"))
    ]
    assert len({item["block_image"] for item in built}) == 3
    # The faces share every chunk of data: what the second one stores is metadata alone.
    assert built[1]["new_layers"] == built[1]["downloaded_bytes"] == 0
    assert built[1]["stored_bytes"] < built[0]["stored_bytes"] // 10 + 300_000
    with overlay_of(layout, scratch) as truth:
        for number, face in enumerate(((), ("--fs", "ext4"))):
            ours = scratch / f"mounted-{number}"
            ours.mkdir()
            cubecache.run("mount", image, str(ours), *face)
            try:
                assert differences(truth, ours, *SKIPPED) == []
            finally:
                cubecache.run("umount", str(ours))


@pytest.mark.parametrize("recipe", ["static-busybox", "python-numpy"])
def test_both_faces_equal_overlayfs(
    new_cubecache: Callable[..., Cubecache], tmp_path: Path, recipe: str
) -> None:
    compare_both_faces(new_cubecache(), recipe, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_both_faces_equal_overlayfs_soak(
    new_cubecache: Callable[..., Cubecache], tmp_path: Path, recipe: str
) -> None:
    assert len(RECIPES) >= 14
    assert os.geteuid() == 0
    compare_both_faces(new_cubecache(), recipe, tmp_path)
