"""Starts in a store: a real small image built, its start prepared, found, carried and packed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from imagemaker.entries import Entry, directory
from imagemaker.layout import Settings as RunSettings
from kits.image import write_image

from imagecache.blockimage.records import RootRecord
from imagecache.catalog import Catalog
from imagecache.chunks import BLOCK
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.daemon.recording import repository_of
from imagecache.daemon.service import ExportRequest, Service
from imagecache.errors import NotFound
from imagecache.profile.chunkreader import ChunkReader
from imagecache.profile.mapping import FilePart, ordinals_of, parts_at, profile_of
from imagecache.profile.merge import carry_over
from imagecache.profile.prepare import LoadedImage, StartBuilder, load_image, program_in
from imagecache.profile.profile import MetadataRange, Profile, Touch
from imagecache.profile.recorder import FirstRead
from imagecache.profile.starts import Starts
from imagecache.settings import Settings
from imagecache.store.open import OpenedStore

LARGE = bytes(range(256)) * 4096


def layers(version: int) -> list[list[Entry]]:
    """Two versions of an application: one file changed, one gone, one new."""
    first = [
        directory("bin"),
        directory("lib"),
        Entry("bin/app", mode=0o755, content=b"#!/bin/sh\nexec true\n"),
        Entry("bin/sh", mode=0o755, content=b"shell " * 3000),
        Entry("lib/large", content=LARGE),
        Entry("lib/changed", content=b"%d" % version * 300_000),
    ]
    first.append(Entry(f"lib/only-{version}", content=b"o" * 50_000))
    return [first]


@dataclass
class Shop:
    """A store with two versions of one image, and what works on it."""

    settings: Settings
    opened: OpenedStore
    catalog: Catalog
    starts: Starts
    builder: StartBuilder
    roots: list[RootRecord]
    references: list[str]

    async def image(self, number: int) -> LoadedImage:
        return await load_image(self.catalog, self.roots[number])


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    settings = Settings(state_dir=tmp_path / "state", store_url=(tmp_path / "store").as_uri())
    async with opened_catalog(settings) as (opened, catalog):
        roots, references = [], []
        for version in (1, 2):
            run = RunSettings(command=("/bin/app",))
            reference = write_image(tmp_path / f"image-{version}", layers(version), run)
            references.append(reference)
            request = ImageRequest.parse(reference, None, "erofs")
            built = await build_image(settings, catalog, request, lambda _: None)
            roots += [r async for r in catalog.roots() if r.image == built.as_json()["image"]]
        starts = Starts(catalog)
        builder = StartBuilder(catalog, starts, opened.reader, scratch=tmp_path / "scratch")
        yield Shop(settings, opened, catalog, starts, builder, roots, references)


async def recorded(shop: Shop, number: int, *paths: bytes) -> Profile:
    """A recording that read these files whole, in this order."""
    image = await shop.image(number)
    reads = [FirstRead(0.0, 0, 2, True)]
    for at, path in enumerate(paths):
        span = image.view.span(*image.view.resolve(path))
        reads.append(FirstRead(float(at), span.blocks.start, len(span.blocks), False))
    return profile_of(image.view, image.root.image, image.block_image, reads)


async def test_reads_of_the_disk_become_files_and_back(shop: Shop) -> None:
    profile = await recorded(shop, 0, b"lib/large", b"bin/sh", b"bin/app")
    assert profile.metadata == (MetadataRange(0, 2),)
    assert [t.path for t in profile.touches] == [b"lib/large", b"bin/sh", b"bin/app"]
    assert profile.touches[0].blocks == len(LARGE) // BLOCK


async def test_every_block_of_the_disk_is_a_file_metadata_or_a_gap(shop: Shop) -> None:
    """Against the view's own answer, block by block."""
    image = await shop.image(0)
    manifest = image.view.manifest
    found: dict[int, tuple[bytes, int]] = {}
    at = 0
    for part in parts_at(image.view, 0, manifest.disk_blocks):
        if isinstance(part, MetadataRange):
            assert part == MetadataRange(0, manifest.metadata_blocks)
            continue
        assert isinstance(part, FilePart)
        span = image.view.span(*image.view.resolve(part.path))
        for block in range(part.blocks):
            place = span.blocks.start + part.start_block + block
            assert place not in found
            found[place] = (part.path, part.start_block + block)
        at += 1
    assert {path for path, _ in found.values()} == {
        b"bin/app", b"bin/sh", b"lib/large", b"lib/changed", b"lib/only-1",
    }  # fmt: skip
    for block, (path, inside) in found.items():
        assert image.view.path_at(block * BLOCK) == (path, inside * BLOCK)


async def test_a_stored_start_is_found_with_its_boot_pack(shop: Shop) -> None:
    profile = await recorded(shop, 0, b"lib/changed", b"bin/sh")
    await shop.builder.build("repo", await shop.image(0), profile)
    known = await shop.starts.find("repo", shop.roots[0].image)
    assert known is not None
    assert known.own
    assert known.profile == profile
    assert known.boot is not None


async def test_a_boot_pack_has_metadata_first_and_then_files_as_they_were_read(shop: Shop) -> None:
    """The order of the stream is the order of the start; each chunk is the image's own."""
    image = await shop.image(0)
    profile = await recorded(shop, 0, b"lib/changed", b"bin/sh")
    plan = ordinals_of(image.view, profile, image.stored_lengths)
    extents = image.view.manifest.extents
    metadata = {
        extents.ordinals[n] for n in extents.overlapping(0, image.view.manifest.metadata_blocks)
    }
    assert set(plan[: len(metadata)]) == metadata
    changed = image.view.chunks_of(image.view.span(*image.view.resolve(b"lib/changed")))
    assert plan[len(metadata) : len(metadata) + len(changed)] == changed
    await shop.builder.build("repo", image, profile)
    known = await shop.starts.own("repo", image.root.image)
    assert known.boot is not None
    assert [e.digest for e in known.boot.entries] == [image.map.digest(n) for n in plan]
    large = image.view.chunks_of(image.view.span(*image.view.resolve(b"lib/large")))
    assert not set(large) & set(plan)


async def test_the_next_version_is_given_the_last_ones_profile(shop: Shop) -> None:
    """Carried over by path: what changed is taken new, what is gone is dropped, all packed."""
    profile = await recorded(shop, 0, b"lib/only-1", b"lib/changed", b"lib/large")
    await shop.builder.build("repo", await shop.image(0), profile)
    record = await shop.builder.prepare("repo", shop.roots[1])
    assert record is not None
    assert record.sources == 1
    known = await shop.starts.own("repo", shop.roots[1].image)
    paths = [touch.path for touch in known.profile.touches]
    assert paths[:2] == [b"lib/changed", b"lib/large"]
    assert b"lib/only-1" not in paths
    assert b"bin/app" in paths  # the prediction's part
    image = await shop.image(1)
    assert known.boot is not None
    digests = {entry.digest for entry in known.boot.entries}
    for path in (b"lib/changed", b"lib/large"):
        for ordinal in image.view.chunks_of(image.view.span(*image.view.resolve(path))):
            assert image.map.digest(ordinal) in digests


async def test_a_host_carries_over_by_itself_where_nobody_did(shop: Shop) -> None:
    """A new version without a start of its own: the old pack's share streams, the rest is asked."""
    repository = repository_of(ImageRequest.parse(shop.references[1], None, "erofs").reference)
    profile = await recorded(shop, 0, b"lib/only-1", b"lib/changed", b"lib/large")
    await shop.builder.build(repository, await shop.image(0), profile)
    service = await Service.open(shop.settings)
    try:
        request = ImageRequest.parse(shop.references[1], None, "erofs")
        export = await service.export(ExportRequest(request, fill="hot"))
        async with asyncio.timeout(20):
            while export.fill is None or export.fill.progress.state != "done":
                await asyncio.sleep(0.02)
        assert export.start is not None
        found = export.start.summary()
        assert found["source"] == "carried profile"
        assert found["error"] is None
        assert found["streamed"]["chunks"] > 0
        image = await shop.image(1)
        for path in (b"lib/changed", b"lib/large"):
            for ordinal in image.view.chunks_of(image.view.span(*image.view.resolve(path))):
                assert service.arena.holds(image.map.digest(ordinal))
        (fresh,) = image.view.chunks_of(image.view.span(*image.view.resolve(b"bin/sh")))[:1]
        assert not service.arena.holds(image.map.digest(fresh))
    finally:
        await service.close()


async def test_a_host_predicts_where_nothing_is_known(shop: Shop) -> None:
    service = await Service.open(shop.settings)
    try:
        request = ImageRequest.parse(shop.references[0], None, "erofs")
        export = await service.export(ExportRequest(request, fill="hot"))
        assert export.start is not None
        async with asyncio.timeout(20):
            while not export.start.summary()["asked_chunks"]:
                await asyncio.sleep(0.02)
        found = export.start.summary()
        assert (found["source"], found["error"]) == ("prediction", None)
        image = await shop.image(0)
        async with asyncio.timeout(20):
            for path in (b"bin/app", b"bin/sh"):  # the entrypoint is a script of bin/sh
                for ordinal in image.view.chunks_of(image.view.span(*image.view.resolve(path))):
                    while not service.arena.holds(image.map.digest(ordinal)):
                        await asyncio.sleep(0.02)
    finally:
        await service.close()


async def test_a_repository_without_any_start_has_none(shop: Shop) -> None:
    assert await shop.starts.find("repo", shop.roots[0].image) is None
    with pytest.raises(NotFound, match="recorded"):
        await shop.starts.own("repo", shop.roots[0].image)


async def test_another_repository_is_no_previous_version(shop: Shop) -> None:
    profile = await recorded(shop, 0, b"bin/sh")
    await shop.builder.build("repo", await shop.image(0), profile)
    assert await shop.starts.find("other", shop.roots[1].image) is None
    known = await shop.starts.find("repo", shop.roots[1].image)
    assert known is not None
    assert not known.own


async def test_damaged_objects_of_a_start_count_as_absent(shop: Shop) -> None:
    """A start is a help: whatever is wrong with it must not keep an image from starting."""
    profile = await recorded(shop, 0, b"bin/sh")
    await shop.builder.build("repo", await shop.image(0), profile)
    store, keys = shop.opened.store, shop.catalog.keys
    for part, left in (("/boottables/", True), ("/profiles/", False), ("/starts/", False)):
        for stat in [s async for s in store.list(keys.prefix) if part in s.key]:
            await store.put(stat.key, b"damaged")
        known = await shop.starts.find("repo", shop.roots[0].image)
        assert (known is not None) is left
        if known is not None:
            assert known.boot is None


async def test_preparing_twice_does_the_work_once(shop: Shop) -> None:
    assert await shop.builder.prepare("repo", shop.roots[0]) is not None
    assert await shop.builder.prepare("repo", shop.roots[0]) is None


async def test_the_disk_is_read_through_verified_chunks(shop: Shop) -> None:
    image = await shop.image(0)
    reader = ChunkReader(image.map, shop.opened.reader)
    span = image.view.span(*image.view.resolve(b"lib/large"))
    pieces = await asyncio.gather(
        *(reader.read(span.offset + at, 100_000) for at in range(0, 800_000, 100_000))
    )
    assert b"".join(pieces) == LARGE[:800_000]


async def test_a_profile_of_files_that_all_went_is_empty_and_packs_metadata(shop: Shop) -> None:
    image = await shop.image(1)
    gone = Profile("sha256:" + "0" * 64, b"x" * 32, 3, (Touch(b"nowhere", 0, 9),), ())
    empty = carry_over(gone, image.root.image, image.block_image, lambda _: None)
    assert empty.touches == ()
    record = await shop.builder.build("repo", image, replace(empty, sources=0))
    assert record.boot_table


@pytest.mark.quick
def test_a_config_of_any_shape_gives_a_program() -> None:
    for config in (None, [], {"config": 3}, {"config": {"Cmd": "x", "Env": [1, "A=b"]}}):
        assert program_in(config).arguments == ()
    program = program_in({"config": {"Entrypoint": ["a"], "Cmd": ["b"], "Env": ["PATH=/x"]}})
    assert program.arguments == ("a", "b")
    assert program.variable("PATH") == b"/x"
