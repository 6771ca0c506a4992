"""`cubecache inspect` and `diff`: what an image is made of, and what two share."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import click

from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.records import RootRecord
from imagecache.catalog import Catalog
from imagecache.chunks import BLOCK
from imagecache.commands.images import find_root
from imagecache.composition import opened_catalog
from imagecache.errors import UsageError
from imagecache.facechoice import FaceChoice
from imagecache.flatten import kinds
from imagecache.flatten.filetable import FileTable
from imagecache.flatten.limits import STORED
from imagecache.imagediff import difference
from imagecache.imageview import ImageView
from imagecache.session import Session, face_option, json_option
from imagecache.terminal import size_text, table_text

SHOWN_FILES = 40
_KINDS = {
    kinds.FIFO: "fifo",
    kinds.CHARACTER: "character device",
    kinds.DIRECTORY: "directory",
    kinds.BLOCK_DEVICE: "block device",
    kinds.REGULAR: "file",
    kinds.SYMLINK: "symlink",
    kinds.SOCKET: "socket",
}


async def load_view(catalog: Catalog, root: RootRecord) -> ImageView:
    """An image's manifest and file tables."""
    manifest = await catalog.block_manifest(root)
    tables = []
    for layer in manifest.layers:
        index = await catalog.layer_index(layer.index, root.generation)
        tables.append(await asyncio.to_thread(FileTable.decode, index.file_table, STORED))
    return ImageView(manifest, tables)


async def _describe(catalog: Catalog, root: RootRecord) -> dict[str, Any]:
    manifest = await catalog.block_manifest(root)
    table = await catalog.location_table(root)
    return {
        "image": root.image,
        "block_image": root.block_image,
        "platform": root.platform,
        "fs": root.face,
        "realm": root.realm,
        "generation": root.generation,
        "config": root.config,
        "size_bytes": root.size_bytes,
        "packed_bytes": root.packed_bytes,
        "packs": list(root.packs),
        "chunks": root.chunks,
        "extents": len(manifest.extents),
        "metadata_bytes": manifest.metadata_blocks * BLOCK,
        "window_bytes": manifest.window_blocks * BLOCK,
        "layers": [
            {
                "diff_id": diff_id,
                "index": layer.index.hex(),
                "offset_bytes": layer.start_block * BLOCK,
                "size_bytes": layer.blocks * BLOCK,
                "chunks": len(ordinals),
                "packed_bytes": sum(table.stored_lengths[n] for n in ordinals),
            }
            for diff_id, layer, ordinals in (
                (
                    diff_id,
                    layer,
                    {
                        manifest.extents.ordinals[n]
                        for n in manifest.extents.overlapping(
                            layer.start_block, layer.start_block + layer.blocks
                        )
                    }
                    if layer.blocks
                    else set(),
                )
                for diff_id, layer in zip(root.layers, manifest.layers, strict=True)
            )
        ],
    }


async def _shares(catalog: Catalog, root: RootRecord) -> list[dict[str, Any]]:
    """The realm's other images that have chunks of this one, most stored bytes first."""
    manifest = await catalog.block_manifest(root)
    lengths = (await catalog.location_table(root)).stored_lengths
    mine = {digest: lengths[n] for n, (digest, _) in enumerate(manifest.chunks)}
    names: dict[str, list[str]] = {}
    for alias in await catalog.aliases():
        names.setdefault(alias.image, []).append(alias.name)
    found = []
    async for other in catalog.roots():
        if other.block_image == root.block_image:
            continue
        chunks = (await catalog.block_manifest(other)).chunks
        shared = [mine[digest] for digest, _ in chunks if digest in mine]
        if shared:
            found.append(
                {
                    "image": other.image,
                    "fs": other.face,
                    "names": sorted(names.get(other.image, [])),
                    "layers": len(set(root.layers).intersection(other.layers)),
                    "chunks": len(shared),
                    "packed_bytes": sum(shared),
                }
            )
    return sorted(found, key=lambda row: (-row["packed_bytes"], row["image"], row["fs"]))


def describe_path(view: ImageView, table: LocationTable, path: bytes) -> dict[str, Any]:
    """Where a file's content lies, and what reading it whole would fetch from a cold store."""
    real, node = view.resolve(path)
    answer: dict[str, Any] = {"path": os.fsdecode(real), "layer": node.layer}
    if node.kind != kinds.REGULAR:
        return answer | {"kind": _KINDS[node.kind], "chunks": []}
    span = view.span(real, node)
    ordinals = view.chunks_of(span)
    return answer | {
        "kind": _KINDS[node.kind],
        "size_bytes": span.size,
        "offset_bytes": span.offset,
        "fetch_bytes": sum(table.stored_lengths[n] for n in ordinals),
        "chunks": [view.manifest.chunks.digest(n).hex() for n in ordinals],
    }


@click.command(
    epilog="\b\nExamples:\n  cubecache inspect docker.io/library/nginx\n"
    "  cubecache inspect docker.io/library/nginx /usr/sbin/nginx\n"
    "  cubecache inspect --shares docker.io/library/nginx"
)
@click.argument("image")
@click.argument("path", required=False)
@click.option("--shares", is_flag=True, help="Also what it shares with each other image.")
@face_option
@json_option
@click.pass_obj
def inspect(session: Session, *, image: str, path: str | None, shares: bool, face: str) -> None:
    """Show an image's layers, regions and chunks, or what reading PATH would fetch."""

    async def gather() -> dict[str, Any]:
        async with opened_catalog(session.settings) as (_, catalog):
            root = await find_root(catalog, image, FaceChoice.parse(face))
            if path is None:
                answer = await _describe(catalog, root)
                return answer | ({"shares": await _shares(catalog, root)} if shares else {})
            view = await load_view(catalog, root)
            table = await catalog.location_table(root)
            return describe_path(view, table, os.fsencode(path))

    answer = asyncio.run(gather())
    plain = [
        (name, size_text(value) if name.endswith("_bytes") else str(value))
        for name, value in answer.items()
        if not isinstance(value, list)
    ]
    text = table_text(plain)
    if path is None:
        rows = [("LAYER", "OFFSET", "SIZE", "CHUNKS", "STORED")]
        rows += [
            (
                layer["diff_id"],
                size_text(layer["offset_bytes"]),
                size_text(layer["size_bytes"]),
                str(layer["chunks"]),
                size_text(layer["packed_bytes"]),
            )
            for layer in answer["layers"]
        ]
        text += "\n\n" + table_text(rows)
        if shares:
            others = [("SHARED WITH", "LAYERS", "CHUNKS", "STORED")]
            others += [
                (
                    ", ".join(other["names"]) or other["image"],
                    str(other["layers"]),
                    str(other["chunks"]),
                    size_text(other["packed_bytes"]),
                )
                for other in answer["shares"]
            ]
            text += "\n\n" + table_text(others)
    else:
        text += f"\nchunks          {len(answer['chunks'])}"
    session.terminal.answer(answer, text)


@click.command(epilog="\b\nExamples:\n  cubecache diff nginx:1.26 nginx:1.27")
@click.argument("before")
@click.argument("after")
@face_option
@json_option
@click.pass_obj
def diff(session: Session, *, before: str, after: str, face: str) -> None:
    """Say what changed between two images in files, chunks and stored bytes."""

    async def gather() -> dict[str, Any]:
        async with opened_catalog(session.settings) as (_, catalog):
            views, tables = [], []
            for image in (before, after):
                root = await find_root(catalog, image, FaceChoice.parse(face))
                views.append(await load_view(catalog, root))
                tables.append(await catalog.location_table(root))
            if views[0].manifest.face != views[1].manifest.face:
                raise UsageError("the two images have different faces")
            return difference(views[0], views[1], tables[1])

    answer = asyncio.run(gather())
    lines = [
        f"files    {len(answer['added'])} added, {len(answer['removed'])} removed, "
        f"{len(answer['changed'])} changed",
        f"chunks   {answer['new_chunks']} new of {answer['chunks']}",
        f"stored   {size_text(answer['new_bytes'])} new of {size_text(answer['stored_bytes'])}",
    ]
    for sign, name in (("+", "added"), ("-", "removed"), ("~", "changed")):
        lines += [f"{sign} {path}" for path in answer[name][:SHOWN_FILES]]
        if len(answer[name]) > SHOWN_FILES:
            lines.append(f"{sign} ... and {len(answer[name]) - SHOWN_FILES} more")
    session.terminal.answer(answer, "\n".join(lines))
