"""`cubecache images` and `rm`: what the store holds, by name."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import click

from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.records import RootRecord
from imagecache.catalog import Catalog
from imagecache.composition import alias_name, opened_catalog
from imagecache.errors import NotFound
from imagecache.facechoice import FaceChoice
from imagecache.imagelist import listed_images
from imagecache.oci.reference import parse_reference
from imagecache.session import Session, json_option
from imagecache.terminal import size_text, table_text

_DIGEST = re.compile(r"(?:sha256:)?[0-9a-f]{8,64}")


async def find_root(catalog: Catalog, image: str, choice: FaceChoice) -> RootRecord:
    """The root behind a reference, a manifest digest or the start of one; NotFound, UsageError."""
    name: Any = image if _DIGEST.fullmatch(image) else None
    if name is None:
        name = alias_name(parse_reference(image, base=Path.cwd()))
    try:
        digest = await catalog.resolve_name(name)
    except NotFound as error:
        raise NotFound(
            f"image {image} is not in realm {catalog.keys.realm}",
            remedy=f"cubecache preload {image}",
        ) from error
    return await catalog.find_root(ImageKey(digest, choice.face, choice.options))


@click.command(epilog="\b\nExamples:\n  cubecache images\n  cubecache images --json")
@json_option
@click.pass_obj
def images(session: Session) -> None:
    """List the images of the realm with their names."""

    async def gather() -> list[dict[str, Any]]:
        async with opened_catalog(session.settings) as (_, catalog):
            return await listed_images(catalog)

    answer = asyncio.run(gather())
    rows = [("NAME", "IMAGE", "FS", "DISK", "STORED", "CHUNKS")]
    rows += [
        (
            ", ".join(item["names"]) or "<none>",
            item["image"].partition(":")[2][:12],
            item["fs"],
            size_text(item["size_bytes"]),
            size_text(item["packed_bytes"]),
            str(item["chunks"]),
        )
        for item in answer
    ]
    session.terminal.answer(answer, table_text(rows))


@click.command("rm", epilog="\b\nExamples:\n  cubecache rm docker.io/library/nginx:1.27")
@click.argument("image")
@json_option
@click.pass_obj
def remove(session: Session, *, image: str) -> None:
    """Drop an image's name. Its objects stay until they are collected."""

    async def drop() -> dict[str, Any]:
        async with opened_catalog(session.settings) as (_, catalog):
            return await _drop(catalog, image)

    answer = asyncio.run(drop())
    session.terminal.answer(
        answer,
        f"dropped {', '.join(answer['dropped'])}; collecting would free "
        f"{size_text(answer['would_free_bytes'])}",
    )


async def _drop(catalog: Catalog, image: str) -> dict[str, Any]:
    aliases = await catalog.aliases()
    if _DIGEST.fullmatch(image):
        wanted = await catalog.resolve_name(image)
        gone = [alias for alias in aliases if alias.image == wanted]
    else:
        name = alias_name(parse_reference(image, base=Path.cwd()))
        gone = [
            alias
            for alias in aliases
            if (alias.repository, alias.tag) == (name.repository, name.tag)
        ]
    if not gone:
        raise NotFound(f"no name {image} in realm {catalog.keys.realm}", remedy="cubecache images")
    kept = {alias.image for alias in aliases if alias not in gone}
    for alias in gone:
        await catalog.drop_alias(alias)
    return {
        "dropped": [alias.name for alias in gone],
        "image": gone[0].image,
        "would_free_bytes": await _only_in(catalog, {alias.image for alias in gone} - kept, kept),
    }


async def _only_in(catalog: Catalog, dropped: set[str], kept: set[str]) -> int:
    """Bytes of the packs that only dropped images rely on."""
    theirs: set[str] = set()
    others: set[str] = set()
    async for root in catalog.roots():
        if root.image in dropped:
            theirs.update(root.packs)
        elif root.image in kept:
            others.update(root.packs)
    total = 0
    for pack in sorted(theirs - others):
        total += (await catalog.store.stat(catalog.keys.pack(bytes.fromhex(pack)))).size
    return total
