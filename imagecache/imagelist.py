"""The images of a realm as people see them: every root with its names."""

from __future__ import annotations

from typing import Any

from imagecache.blockimage.records import AliasRecord, RootRecord
from imagecache.catalog import Catalog
from imagecache.errors import NotFound


async def listed_images(catalog: Catalog) -> list[dict[str, Any]]:
    """Every image of the realm, by name: what `images --json` and the control API answer.

    Sizes in bytes; raises what reading the roots raises.
    """
    roots = [root async for root in catalog.roots()]
    names = _names(await catalog.aliases())
    roots.sort(key=lambda root: (names.get(root.image, ["~"]), root.image))
    return [image_json(root, names.get(root.image, [])) for root in roots]


def image_json(root: RootRecord, names: list[str]) -> dict[str, Any]:
    """One image's JSON object."""
    return {
        "names": names,
        "image": root.image,
        "block_image": root.block_image,
        "fs": root.face,
        "platform": root.platform,
        "size_bytes": root.size_bytes,
        "packed_bytes": root.packed_bytes,
        "chunks": root.chunks,
        "layers": len(root.layers),
    }


async def drop_names(catalog: Catalog, image: str) -> list[str]:
    """Drops every name of a manifest digest and returns them; NotFound where it has none.

    The image's objects stay until collection.
    """
    gone = [alias for alias in await catalog.aliases() if alias.image == image]
    if not gone:
        raise NotFound(f"image {image} has no name", remedy="cubecache images")
    for alias in gone:
        await catalog.drop_alias(alias)
    return [alias.name for alias in gone]


def _names(aliases: list[AliasRecord]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for alias in aliases:
        names.setdefault(alias.image, []).append(alias.name)
    return names
