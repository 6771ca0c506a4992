"""`cubecache verify`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import click

from imagecache.commands.images import find_root
from imagecache.composition import opened_catalog, parse_face
from imagecache.errors import Corrupt
from imagecache.session import Session, face_option, json_option
from imagecache.terminal import size_text
from imagecache.verify import Verifier

SHOWN = 20


@click.command(epilog="\b\nExamples:\n  cubecache verify docker.io/library/nginx")
@click.argument("image")
@face_option
@json_option
@click.pass_obj
def verify(session: Session, *, image: str, face: str) -> None:
    """Read every chunk of an image back from the store and check it."""

    async def check() -> dict[str, Any]:
        async with opened_catalog(session.settings) as (opened, catalog):
            root = await find_root(catalog, image, parse_face(face))
            manifest = await catalog.block_manifest(bytes.fromhex(root.block_image))
            locations = await catalog.location_table(bytes.fromhex(root.locations))
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
            remedy="remove the damaged packs and preload the image again",
        )
    session.terminal.answer(
        answer,
        f"{image}: {answer['chunks']} chunks, {size_text(answer['stored_bytes'])} read back, "
        "all intact",
    )
