"""`mount --record` and `run --record`: what they read is stored as a profile when they end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from imagemaker.entries import Entry, directory
from kits.image import recipe_layout, reference, write_image
from kits.journey import Cubecache
from testbed.processes import Stage


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


def test_a_recorded_mount(stage: Stage, tmp_path: Path) -> None:
    files = [directory("lib"), Entry("lib/read", content=b"r" * 300_000)]
    files.append(Entry("lib/left", content=b"l" * 300_000))
    image = write_image(tmp_path / "image", [files])
    host = Cubecache(stage, stage.folder / "state")
    host.preload(image)
    folder = tmp_path / "mounted"
    folder.mkdir()
    host.run("mount", "--record", image, str(folder))
    try:
        assert (folder / "lib/read").read_bytes() == b"r" * 300_000
    finally:
        host.run("umount", str(folder))
    known = host.run("profile", "show", image, "--json").json()
    assert known["recordings"] == 1
    assert {touch["path"] for touch in known["touches"]} == {"lib/read"}


def test_a_recorded_run(stage: Stage) -> None:
    image = reference(recipe_layout("static-busybox"))
    host = Cubecache(stage, stage.folder / "state")
    host.preload(image)
    said = host.run("run", "--record", image, "--", "/bin/busybox", "true")
    assert "not recorded" not in said.err
    known = host.run("profile", "show", image, "--json").json()
    assert known["recordings"] == 1
    assert "bin/busybox" in {touch["path"] for touch in known["touches"]}
