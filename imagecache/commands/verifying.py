"""`cubecache verify`."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from imagecache.commands.images import find_root
from imagecache.composition import (
    ImageRequest,
    build_image,
    opened_catalog,
    prepare_state_dir,
)
from imagecache.errors import Corrupt, NotFound
from imagecache.facechoice import FaceChoice
from imagecache.oci.reference import RegistryReference, parse_reference
from imagecache.repair.presence import PresenceCheck
from imagecache.session import Session, face_option, json_option
from imagecache.terminal import size_text
from imagecache.verify import Verifier

SHOWN = 20


@click.command(
    epilog="\b\nExamples:\n  cubecache verify docker.io/library/nginx\n"
    "  cubecache verify --rebuild docker.io/library/nginx"
)
@click.argument("image")
@click.option("--fast", is_flag=True, help="Look only whether all is there and long enough.")
@click.option("--rebuild", is_flag=True, help="Build it again from its source, and compare.")
@face_option
@json_option
@click.pass_obj
def verify(session: Session, *, image: str, fast: bool, rebuild: bool, face: str) -> None:
    """Read every chunk of an image back from the store and check it.

    With --rebuild the image is pulled and built again into a scratch store, and must come out
    with the same block image digest.
    """
    if fast:
        _fast(session, image, face)
        return
    if rebuild:
        answer = asyncio.run(_rebuild(session, image, face))
        session.terminal.answer(answer, f"{image}: built again, {answer['block_image']}: the same")
        return

    async def check() -> dict[str, Any]:
        async with opened_catalog(session.settings) as (opened, catalog):
            root = await find_root(catalog, image, FaceChoice.parse(face))
            manifest = await catalog.block_manifest(root)
            locations = await catalog.location_table(root)
            verifier = Verifier(catalog, opened.reader, manifest, locations)
            report = await verifier.run(
                lambda done: session.terminal.progress("verify", done, root.packed_bytes)
            )
            return {
                "image": root.image,
                "block_image": root.block_image,
                "chunks": report.chunks,
                "stored_bytes": report.stored_bytes,
                "damaged": sorted(report.damaged),
            }

    started = time.monotonic()
    answer = asyncio.run(check())
    answer["seconds"] = round(time.monotonic() - started, 3)
    if answer["damaged"]:
        raise Corrupt(
            f"{len(answer['damaged'])} chunks of {image} are damaged or missing: "
            + ", ".join(answer["damaged"][:SHOWN]),
            remedy="cubecache repair",
        )
    session.terminal.answer(
        answer,
        f"{image}: {answer['chunks']} chunks, {size_text(answer['stored_bytes'])} read back, "
        "all intact",
    )


def _fast(session: Session, image: str, face: str) -> None:
    async def look() -> dict[str, Any]:
        async with opened_catalog(session.settings) as (opened, catalog):
            root = await find_root(catalog, image, FaceChoice.parse(face))
            damage = await PresenceCheck(catalog, opened.reader).check(root)
            return {
                "image": root.image,
                "block_image": root.block_image,
                "packs": len(root.packs),
                "damage": [found.as_json() for found in damage],
            }

    started = time.monotonic()
    answer = asyncio.run(look())
    answer["seconds"] = round(time.monotonic() - started, 3)
    if answer["damage"]:
        raise Corrupt(
            f"{len(answer['damage'])} objects of {image} are missing or too short: "
            + ", ".join(f"{x['key']}: {x['what']}" for x in answer["damage"][:SHOWN]),
            remedy="cubecache repair",
        )
    session.terminal.answer(answer, f"{image}: {answer['packs']} packs and all else are there")


async def _rebuild(session: Session, image: str, face: str) -> dict[str, Any]:
    settings = session.settings
    async with opened_catalog(settings) as (_, catalog):
        root = await find_root(catalog, image, FaceChoice.parse(face))
        sources = [alias.name for alias in await catalog.aliases() if alias.image == root.image]
    if not sources:
        raise NotFound(
            f"image {root.image} has no name here, so nobody knows where it came from",
            remedy="preload it by its reference",
        )
    source = pinned(sources[0], root.image)
    await asyncio.to_thread(prepare_state_dir, settings)
    with tempfile.TemporaryDirectory(dir=settings.state_dir, prefix="rebuild-") as scratch:
        there = dataclasses.replace(
            settings, state_dir=Path(scratch), store_url=Path(scratch, "store").as_uri()
        )
        async with opened_catalog(there) as (_, empty):
            request = ImageRequest(source, root.platform, face)
            result = await build_image(
                there,
                empty,
                request,
                lambda step: session.terminal.progress(
                    f"{source}: {step.stage}", step.done_bytes, step.total_bytes
                ),
            )
    if result.image != root.image:
        raise NotFound(
            f"{source} is {result.image} by now, no longer {root.image}",
            remedy="name the image by its digest",
        )
    if result.block_image != root.block_image:
        raise Corrupt(f"{image} was built as {root.block_image}, and now as {result.block_image}")
    return {"image": root.image, "block_image": root.block_image, "seconds": result.seconds}


def pinned(name: str, image: str) -> str:
    """A reference to the same image by digest, where its source can be asked for one."""
    reference = parse_reference(name)
    if isinstance(reference, RegistryReference):
        return f"{reference.host}/{reference.repository}@{image}"
    return name
