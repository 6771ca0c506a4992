"""From a reference to a verified block image in a store, and away again."""

import shutil
from collections.abc import Callable
from pathlib import Path

from imagemaker.entries import Entry
from kits.image import recipe_layout, reference, write_image
from kits.journey import Cubecache, tool
from testbed.servers import ObjectStore, Registry


def push(layout: str, registry: Registry, name: str) -> str:
    target = f"{registry.address}/{name}"
    options = ["--insecure-policy", "copy", "--quiet", "--preserve-digests"]
    tool("skopeo", *options, "--dest-tls-verify=false", layout, f"docker://{target}")
    return target


def test_preload_from_a_registry_into_an_object_store(
    new_cubecache: Callable[..., Cubecache],
    registry: Registry,
    busybox: str,
    object_store: ObjectStore,
) -> None:
    cubecache = new_cubecache(object_store.url())
    image = push(busybox, registry, "journeys/busybox:v1")
    first = cubecache.preload(image)
    assert first["image"].startswith("sha256:")
    assert first["size_bytes"] % 4096 == 0
    assert first["chunks"] >= first["new_chunks"] > 0
    assert 0 < first["stored_bytes"] <= object_store.stored_bytes()
    assert first["seconds"] >= 0
    again = cubecache.preload(image)
    assert again["block_image"] == first["block_image"]
    assert (again["new_chunks"], again["stored_bytes"]) == (0, 0)
    cubecache.run("verify", image)
    listed = cubecache.run("images", "--json").out
    assert first["image"] in listed
    assert "default" in {part for path in object_store.folder.rglob("*") for part in path.parts}


def test_every_way_in_gives_the_same_block_image(
    new_cubecache: Callable[..., Cubecache], registry: Registry, busybox: str
) -> None:
    by_name = push(busybox, registry, "journeys/ways:v1")
    by_layout = new_cubecache().preload(busybox)
    by_registry = new_cubecache().preload(by_name)
    by_digest = new_cubecache().preload(f"{by_name}@{by_registry['image']}")
    assert by_layout["image"] == by_registry["image"] == by_digest["image"]
    digests = {found["block_image"] for found in (by_layout, by_registry, by_digest)}
    assert len(digests) == 1


def test_a_docker_archive_has_the_same_content(cubecache: Cubecache, tmp_path: Path) -> None:
    # Docker's archives know no zstd, so not the image with every oddity.
    layers = [[Entry("a", content=b"a" * 9000)], [Entry("b", content=b"b" * 300_000)]]
    layout = write_image(tmp_path / "layout", layers)
    archive = tmp_path / "saved.tar"
    options = ["--insecure-policy", "copy", "--quiet"]
    tool("skopeo", *options, layout, f"docker-archive:{archive}:journeys/saved:v1")
    by_layout = cubecache.preload(layout)
    by_archive = cubecache.preload(f"docker-archive:{archive}")
    assert by_archive["block_image"] == by_layout["block_image"]
    assert by_archive["new_layers"] == 0


def test_a_new_version_stores_its_changed_layer_alone(cubecache: Cubecache, busybox: str) -> None:
    first = cubecache.preload(busybox)
    second = cubecache.preload(reference(recipe_layout("static-busybox-v2")))
    assert second["block_image"] != first["block_image"]
    assert second["new_chunks"] < first["new_chunks"] / 4
    assert second["stored_bytes"] < first["stored_bytes"] / 4
    cubecache.run("verify", busybox)
    (other,) = cubecache.run("inspect", "--shares", busybox, "--json").json()["shares"]
    assert other["image"] == second["image"] and other["layers"] == 3
    assert "SHARED WITH" in cubecache.run("inspect", "--shares", busybox).out


def test_several_images_print_one_object_per_line(cubecache: Cubecache, busybox: str) -> None:
    other = reference(recipe_layout("static-busybox-v2"))
    lines = cubecache.run("preload", busybox, other, "--json").lines()
    assert len(lines) == 2
    wanted = "image block_image size_bytes stored_bytes chunks new_chunks seconds".split()
    assert all(set(wanted) <= set(line) for line in lines)


def test_json_may_stand_before_or_after_the_command(cubecache: Cubecache, busybox: str) -> None:
    cubecache.preload(busybox)
    after = cubecache.run("images", "--json").out
    before = tool(str(cubecache.command()[0]), *cubecache.command()[1:], "--json", "images").out
    assert before == after


def test_inspect_shows_image_and_layers(cubecache: Cubecache, busybox: str) -> None:
    found = cubecache.preload(busybox)
    shown = cubecache.run("inspect", busybox, "--json").out
    assert found["block_image"] in shown
    assert found["image"] in shown
    assert shown.count("diff_id") == 4


def test_rm_drops_the_name_and_says_what_it_would_free(cubecache: Cubecache, busybox: str) -> None:
    cubecache.preload(busybox)
    answer = cubecache.run("rm", busybox)
    assert "free" in answer.out.lower()
    assert cubecache.names() == []
    assert cubecache.run("rm", busybox, expect=66).err


def test_verify_finds_a_flipped_bit(cubecache: Cubecache, busybox: str) -> None:
    """G12: a stored object with a flipped bit is found and named, with exit 74."""
    cubecache.preload(busybox)
    largest = max(
        (path for path in cubecache.state.rglob("*") if path.is_file() and "/packs/" in str(path)),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 3] ^= 1
    largest.chmod(0o644)
    largest.write_bytes(content)
    answer = cubecache.run("verify", busybox, expect=74)
    assert answer.err


def test_a_preloaded_image_needs_no_source(
    new_cubecache: Callable[..., Cubecache], busybox: str, tmp_path: Path
) -> None:
    """Offline: with the source gone, images, verify, export and reads go on."""
    cubecache = new_cubecache()
    copy = tmp_path / "copy"
    shutil.copytree(busybox.split(":")[1], copy)
    image = reference(copy)
    cubecache.preload(image)
    shutil.rmtree(copy)
    cubecache.run("verify", image)
    daemon = cubecache.serve()
    uri = daemon.export(image)
    tool("nbdcopy", uri, "null:")
    assert daemon.stop() == 0


def test_a_preloaded_tag_works_while_its_registry_is_down(
    new_cubecache: Callable[..., Cubecache], busybox: str
) -> None:
    """Offline: an image that is in the store starts by its tag while the registry is away."""
    from testbed.servers import start_registry

    cubecache = new_cubecache()
    own = start_registry(cubecache.stage)
    image = push(busybox, own, "journeys/offline:v1")
    cubecache.preload(image)
    own.process.kill()
    daemon = cubecache.serve()
    tool("nbdcopy", daemon.export(image), "null:")
    never = f"{own.address}/journeys/never:v1"
    assert cubecache.run("export", never, expect=69).err
