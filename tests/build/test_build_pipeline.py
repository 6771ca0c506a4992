"""Builds: what is stored, what is reused, what a kill leaves, what a hostile layer costs."""

import asyncio
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from imagemaker.entries import Entry, directory, whiteout
from kits.image import write_image

from imagecache.build.progress import BuildResult
from imagecache.build.workers import Worker
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.errors import Busy, CubecacheError, LimitExceeded, NotFound, Rejected
from imagecache.flatten.limits import Limits
from imagecache.settings import BuildSection, Settings
from imagecache.verify import Verifier


def settings(root: Path, name: str = "one") -> Settings:
    return Settings(state_dir=root / name, store_url=(root / name / "store").as_uri())


def build(where: Settings, reference: str) -> BuildResult:
    async def run() -> BuildResult:
        async with opened_catalog(where) as (_, catalog):
            request = ImageRequest.parse(reference, None, "erofs")
            return await build_image(where, catalog, request, lambda _: None)

    return asyncio.run(run())


def stored_keys(where: Settings) -> list[str]:
    async def run() -> list[str]:
        async with opened_catalog(where) as (opened, catalog):
            return sorted([stat.key async for stat in opened.store.list(catalog.keys.prefix)])

    return asyncio.run(run())


def damaged(where: Settings) -> tuple[int, list[str]]:
    """How many committed images there are, and which of their chunks cannot be read back."""

    async def run() -> tuple[int, list[str]]:
        async with opened_catalog(where) as (opened, catalog):
            images, broken = 0, []
            async for root in catalog.roots():
                manifest = await catalog.block_manifest(root)
                table = await catalog.location_table(root)
                verifier = Verifier(catalog, opened.reader, manifest, table)
                broken += (await verifier.run(lambda _: None)).damaged
                images += 1
            return images, broken

    return asyncio.run(run())


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def base_layer(files: int = 40) -> list[Entry]:
    names = [f"usr/lib/file{n:03d}" for n in range(files)]
    return [
        directory("usr"),
        directory("usr/lib"),
        *(Entry(name, content=noise(n, 3000 + 97 * n)) for n, name in enumerate(names)),
        Entry("usr/lib/large", content=noise(99, 1 << 20) + bytes(1 << 20) + noise(98, 5000)),
    ]


def test_second_version_stores_its_changed_layer_alone(tmp_path: Path) -> None:
    first = write_image(tmp_path / "a", [base_layer(), [Entry("app", content=noise(7, 9000))]])
    second = write_image(tmp_path / "b", [base_layer(), [Entry("app", content=noise(8, 9000))]])
    where = settings(tmp_path)
    one = build(where, first)
    two = build(where, second)
    assert one.new_layers == 2
    assert two.new_layers == 1
    assert two.downloaded_bytes < 15_000
    assert two.new_chunks <= 5  # the application and, of another repository, the metadata
    assert damaged(where) == (2, [])


def test_same_image_again_is_a_look_up(tmp_path: Path) -> None:
    reference = write_image(tmp_path / "a", [base_layer()])
    where = settings(tmp_path)
    one = build(where, reference)
    keys = stored_keys(where)
    two = build(where, reference)
    assert (two.block_image, two.new_chunks, two.stored_bytes) == (one.block_image, 0, 0)
    assert stored_keys(where) == keys


def test_block_image_does_not_depend_on_what_the_store_held(tmp_path: Path) -> None:
    """D7: an empty store and one with a relative give the same digest."""
    image = [base_layer(), [whiteout("usr/lib/file001"), Entry("new", content=b"n" * 5000)]]
    first = write_image(tmp_path / "a", image)
    relative = write_image(tmp_path / "r", [base_layer(30), [Entry("x", content=b"y")]])
    alone = build(settings(tmp_path, "one"), first)
    build(settings(tmp_path, "two"), relative)
    beside = build(settings(tmp_path, "two"), first)
    assert alone.block_image == beside.block_image
    assert beside.new_chunks < alone.new_chunks or beside.new_layers == alone.new_layers


def test_named_images_of_other_repositories_give_their_chunks(tmp_path: Path) -> None:
    """`--reference`: what they hold is not stored again, and no digest notices."""
    first = write_image(tmp_path / "a", [base_layer()])
    second = write_image(tmp_path / "b", [[*base_layer(), Entry("zz", content=noise(5, 9000))]])
    alone = settings(tmp_path, "alone")
    build(alone, first)
    stranger = build(alone, second)
    where = settings(tmp_path, "related")
    build(where, first)
    configured = dataclasses.replace(where, build=BuildSection(related=(first, "oci:/not/there")))
    related = build(configured, second)
    assert related.block_image == stranger.block_image
    assert related.stored_bytes * 10 < stranger.stored_bytes
    assert damaged(where) == (2, [])


def test_limits_are_settings(tmp_path: Path) -> None:
    """A limit stops a build by name, and a higher one lets it pass and be read."""
    image = write_image(tmp_path / "a", [base_layer()])
    where = settings(tmp_path)
    with pytest.raises(LimitExceeded, match="entries") as refused:
        build(dataclasses.replace(where, limits=Limits(entries=10)), image)
    assert "[limits] entries" in (refused.value.remedy or "")
    assert build(dataclasses.replace(where, limits=Limits(entries=100)), image).chunks


def test_empty_image_and_repeated_layer(tmp_path: Path) -> None:
    """B9: an image of no layers is an empty file system; one layer twice is applied twice."""
    where = settings(tmp_path)
    empty = build(where, write_image(tmp_path / "e", []))
    layer = [Entry("a", content=b"a" * 5000)]
    twice = build(where, write_image(tmp_path / "t", [layer, [whiteout("a")], layer]))
    assert empty.chunks >= 1
    assert twice.layers == 3
    assert damaged(where) == (2, [])


def replace_diff_id(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    blobs = folder / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_bytes())
    config = json.loads((blobs / manifest["config"]["digest"][7:]).read_bytes())
    config["rootfs"]["diff_ids"][0] = "sha256:" + "0" * 64
    for document, descriptor in ((config, manifest["config"]), (manifest, index["manifests"][0])):
        raw = json.dumps(document).encode()
        digest = hashlib.sha256(raw).hexdigest()
        (blobs / digest).write_bytes(raw)
        descriptor |= {"digest": f"sha256:{digest}", "size": len(raw)}
    (folder / "index.json").write_text(json.dumps(index))


def test_layer_with_another_diff_id_publishes_nothing(tmp_path: Path) -> None:
    """B12: the diff id is verified; a mismatch leaves no image, no name and no layer record."""
    reference = write_image(tmp_path / "a", [base_layer()])
    replace_diff_id(tmp_path / "a")
    where = settings(tmp_path)
    with pytest.raises(Rejected, match="diff id"):
        build(where, reference)
    keys = stored_keys(where)
    assert not [key for key in keys if "/roots/" in key or "/aliases/" in key or "/layers/" in key]
    assert not list((where.state_dir / "spool").rglob("work/*"))


def test_hostile_layer_costs_a_job_not_the_process(tmp_path: Path) -> None:
    """A worker past its deadline is killed, and the caller hears LimitExceeded."""
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "never")
    job = {
        "kind": "layer",
        "blob": str(tmp_path / "never"),
        "blob_bytes": 1,
        "diff_id": "sha256:" + "0" * 64,
        "directory": str(tmp_path / "out"),
        "known": [],
        "references": [],
        "limits": {},
        "level": 3,
        "generation": 1,
    }

    async def run() -> None:
        async for _ in Worker().run(job, deadline_seconds=2):
            pass

    with pytest.raises(LimitExceeded, match="2 seconds"):
        asyncio.run(run())


def test_second_builder_on_a_state_directory_is_refused_by_pid(tmp_path: Path) -> None:
    from imagecache.build.spool import builder_lock

    with builder_lock(tmp_path / "builder.lock"), pytest.raises(Busy, match=str(os.getpid())):
        with builder_lock(tmp_path / "builder.lock"):
            pass


def test_unknown_image_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        build(settings(tmp_path), f"oci:{tmp_path / 'nowhere'}:latest")


BUILD_SCRIPT = """
import asyncio, sys
from pathlib import Path
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.settings import Settings
where = Settings(state_dir=Path(sys.argv[1]), store_url=Path(sys.argv[1], "store").as_uri())
async def run():
    async with opened_catalog(where) as (_, catalog):
        request = ImageRequest.parse(sys.argv[2], None, "erofs")
        await build_image(where, catalog, request, lambda _: None)
asyncio.run(run())
"""


def kill_builds(tmp_path: Path, kills: int) -> None:
    seed = int(os.environ.get("CUBECACHE_SEED", time.time_ns() % 1_000_000))
    print(f"seed {seed}")
    dice = random.Random(seed)
    layers = [base_layer(), [Entry(f"d{n}", content=noise(n, 400_000)) for n in range(20)]]
    reference = write_image(tmp_path / "a", layers)
    wanted = build(settings(tmp_path, "quiet"), reference).block_image
    where = settings(tmp_path, "killed")
    attempted = 0
    while attempted < kills:
        child = subprocess.Popen(
            [sys.executable, "-c", BUILD_SCRIPT, str(where.state_dir), reference],
            start_new_session=True,
        )
        try:
            child.wait(dice.uniform(0.2, 1.2))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            attempted += 1
        child.wait()
        if where.state_dir.exists():
            images, broken = damaged(where)
            assert not broken, f"seed {seed}: a visible image has damaged chunks"
            if images:  # it was done before the kill: begin anew
                for key in stored_keys(where):
                    (where.state_dir / "store" / key).unlink()
    assert attempted == kills
    assert build(where, reference).block_image == wanted
    assert damaged(where) == (1, [])


def test_killed_builds_leave_no_readable_half(tmp_path: Path) -> None:
    kill_builds(tmp_path, 4)


@pytest.mark.soak
def test_killed_builds_leave_no_readable_half_soak(tmp_path: Path) -> None:
    kill_builds(tmp_path, 100)


def test_errors_travel_from_worker_to_caller_with_their_kind(tmp_path: Path) -> None:
    """C37: what is not a tar is refused by name, fast."""
    from kits.image import write_tars

    reference = write_tars(tmp_path / "z", [b"<html>not found</html>" * 100], compression="none")
    with pytest.raises(CubecacheError) as caught:
        build(settings(tmp_path), reference)
    assert isinstance(caught.value, Rejected)
