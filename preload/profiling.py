"""`cubecache profile record|show|build|apply` and `cubecache explain`."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click

from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.records import RootRecord
from imagecache.catalog import Catalog
from imagecache.chunks import BLOCK
from imagecache.composition import ImageRequest, alias_name, opened_catalog
from imagecache.errors import CubecacheError, NotFound
from imagecache.explain.page import page_html
from imagecache.explain.text import report_text
from imagecache.facechoice import FaceChoice
from imagecache.oci.reference import parse_reference
from imagecache.profile.merge import merge_profiles
from imagecache.profile.prepare import (
    StartBuilder,
    carried,
    load_image,
    prepare_quietly,
    program_of,
)
from imagecache.profile.starts import KnownStart, Starts
from imagecache.session import Session, face_option, json_option
from imagecache.settings import Settings
from imagecache.store.open import OpenedStore
from imagecache.terminal import size_text, table_text
from preload.client import Client, connect

_SHOWN_FILES = 30
_POLL_SECONDS = 0.5


async def prepare_here(
    settings: Settings, opened: OpenedStore, catalog: Catalog, request: ImageRequest
) -> None:
    """After a preload in this process: a start for the image, from what is known; never fails."""
    repository, root = await _root(catalog, request)
    starts = Starts(catalog)
    builder = StartBuilder(catalog, starts, opened.reader, scratch=_scratch(settings))
    await prepare_quietly(builder, repository, root)


def _scratch(settings: Settings) -> Path:
    return settings.state_dir / "spool" / "boot"


async def _root(catalog: Catalog, request: ImageRequest) -> tuple[str, RootRecord]:
    name = alias_name(parse_reference(request.reference))
    digest = await catalog.resolve_name(name)
    choice = FaceChoice.parse(request.face)
    key = ImageKey(digest, choice.face, choice.options)
    return name.repository, await catalog.find_root(key)


@asynccontextmanager
async def _tools(
    settings: Settings,
) -> AsyncIterator[tuple[Catalog, Starts, StartBuilder]]:
    async with opened_catalog(settings) as (opened, catalog):
        starts = Starts(catalog)
        yield (
            catalog,
            starts,
            StartBuilder(catalog, starts, opened.reader, scratch=_scratch(settings)),
        )


@click.group()
def profile() -> None:
    """What the starts of images read: record it, see it, build boot packs from it."""


@profile.command(
    epilog="\b\nExamples:\n  cubecache profile record nginx-0123456789ab --seconds 20\n"
    "  cubecache profile record nginx-0123456789ab --stop"
)
@click.argument("name", metavar="EXPORT")
@click.option("--seconds", type=click.FloatRange(0.1, 3600), help="End it after this time.")
@click.option("--stop", is_flag=True, help="End the recording that goes on, and store it.")
@click.option("--detach", is_flag=True, help="Begin it and return.")
@json_option
@click.pass_obj
def record(session: Session, *, name: str, seconds: float | None, stop: bool, detach: bool) -> None:
    """Record what an export's clients read, and store it as the image's profile.

    It begins with the next read and ends by itself when reads calm down, after --seconds, or by
    --stop. Several recordings of one image merge; a boot pack is built from them at once. To record
    a start from its first read on: cubecache export --record IMAGE.
    """

    async def call() -> dict[str, Any]:
        async with connect(session.settings, start=False) as client:
            if stop:
                return await client.stop_recording(name)
            state = await client.record(name, seconds)
            return state if detach else await _recorded(client, name)

    state = asyncio.run(call())
    text = f"{name}: recording {state['recording']}, {state['reads']} reads"
    if state["recording_error"]:
        text += f": {state['recording_error']}"
    session.terminal.answer(state, text)


async def _recorded(client: Client, name: str) -> dict[str, Any]:
    while True:
        found = [item for item in await client.exports() if item["name"] == name]
        if not found:
            raise NotFound(f"export {name} ended while it was recorded")
        state: dict[str, Any] = found[0]["start"]
        if state["recording"] not in ("on", "saving"):
            return state
        await asyncio.sleep(_POLL_SECONDS)


@profile.command(epilog="\b\nExamples:\n  cubecache profile show docker.io/library/nginx")
@click.argument("image")
@face_option
@json_option
@click.pass_obj
def show(session: Session, *, image: str, face: str) -> None:
    """What is known of an image's start: files in the order in which they are read."""
    request = ImageRequest.parse(image, None, face)

    async def call() -> KnownStart:
        async with _tools(session.settings) as (catalog, starts, _):
            repository, root = await _root(catalog, request)
            known = await starts.find(repository, root.image)
            if known is None:
                raise NotFound(
                    f"nothing is known of the start of {image}",
                    remedy="cubecache profile build IMAGE, or export --record IMAGE",
                )
            return known

    known = asyncio.run(call())
    session.terminal.answer(_known_json(known), _known_text(known))


def _known_json(known: KnownStart) -> dict[str, Any]:
    return {
        "image": known.record.image,
        "own": known.own,
        "recordings": known.profile.sources,
        "profile": known.record.profile,
        "files": known.profile.paths,
        "bytes": known.profile.blocks * BLOCK,
        "touches": [
            {
                "path": os.fsdecode(touch.path),
                "offset": touch.start_block * BLOCK,
                "length": touch.blocks * BLOCK,
                "seen": touch.seen,
            }
            for touch in known.profile.touches
        ],
        "metadata": [
            {"offset": part.start_block * BLOCK, "length": part.blocks * BLOCK}
            for part in known.profile.metadata
        ],
        "boot_pack": None
        if known.boot is None
        else {
            "name": known.boot.pack.hex(),
            "chunks": len(known.boot.entries),
            "stored_bytes": known.boot.stored_bytes,
        },
    }


def _known_text(known: KnownStart) -> str:
    made = f"{known.profile.sources} recordings" if known.profile.sources else "a prediction"
    lines = [
        f"{known.record.image}{'' if known.own else ' (another version of the repository)'}",
        f"  from {made}: {size_text(known.profile.blocks * BLOCK)} of {known.profile.paths} files",
    ]
    if known.boot is not None:
        lines.append(
            f"  boot pack: {len(known.boot.entries)} chunks, {size_text(known.boot.stored_bytes)}"
        )
    sizes: Counter[bytes] = Counter()
    for touch in known.profile.touches:
        sizes[touch.path] += touch.blocks * BLOCK
    rows = [("#", "READ", "FILE")]
    rows += [
        (
            str(number + 1),
            size_text(size),
            "/" + os.fsdecode(path).encode("unicode_escape").decode(),
        )
        for number, (path, size) in enumerate(list(sizes.items())[:_SHOWN_FILES])
    ]
    lines.append(table_text(rows))
    if len(sizes) > _SHOWN_FILES:
        lines.append(f"and {len(sizes) - _SHOWN_FILES} files more")
    return "\n".join(lines)


@profile.command(epilog="\b\nExamples:\n  cubecache profile build docker.io/library/nginx")
@click.argument("image")
@click.option("--predict", is_flag=True, help="From the image's files, even if it has a profile.")
@face_option
@json_option
@click.pass_obj
def build(session: Session, *, image: str, predict: bool, face: str) -> None:
    """Build an image's boot pack: from its profile, else from a prediction."""
    request = ImageRequest.parse(image, None, face)

    async def call() -> KnownStart:
        async with _tools(session.settings) as (catalog, starts, builder):
            repository, root = await _root(catalog, request)
            loaded = await load_image(catalog, root)
            known = None if predict else await starts.find(repository, root.image)
            if known is None:
                chosen = await builder.predict(loaded, await program_of(catalog, root))
            else:
                chosen = await asyncio.to_thread(carried, known, loaded)
            await builder.build(repository, loaded, chosen)
            return await starts.own(repository, root.image)

    known = asyncio.run(call())
    session.terminal.answer(_known_json(known), _known_text(known))


@profile.command(
    epilog="\b\nExamples:\n  cubecache profile apply registry.example/app:1 registry.example/app:2"
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@face_option
@json_option
@click.pass_obj
def apply(session: Session, *, source: str, target: str, face: str) -> None:
    """Carry the profile of one image over to another one, and build its boot pack.

    Files that TO has not are dropped. Where TO has recordings of its own, the two merge. For the
    next version of a repository this happens by itself.
    """
    requests = [ImageRequest.parse(text, None, face) for text in (source, target)]

    async def call() -> KnownStart:
        async with _tools(session.settings) as (catalog, starts, builder):
            from_repository, from_root = await _root(catalog, requests[0])
            known = await starts.own(from_repository, from_root.image)
            repository, root = await _root(catalog, requests[1])
            loaded = await load_image(catalog, root)
            chosen = await asyncio.to_thread(carried, known, loaded)
            there = await starts.find(repository, root.image)
            if there is not None and there.own and there.profile.sources:
                own = await asyncio.to_thread(carried, there, loaded)
                chosen = await asyncio.to_thread(merge_profiles, [own, chosen])
            await builder.build(repository, loaded, chosen)
            return await starts.own(repository, root.image)

    known = asyncio.run(call())
    session.terminal.answer(_known_json(known), _known_text(known))


@click.command(
    epilog="\b\nExamples:\n  cubecache explain nginx-0123456789ab\n"
    "  cubecache explain nginx-0123456789ab --html start.html"
)
@click.argument("name", metavar="EXPORT")
@click.option(
    "--html", "page", type=click.Path(path_type=Path, dir_okay=False), help="Write one HTML page."
)
@json_option
@click.pass_obj
def explain(session: Session, *, name: str, page: Path | None) -> None:
    """Why an export's start took as long as it did.

    Each wait with its file and cause, what was read for nothing, what was brought ahead and used or
    not, and what the start would have waited with the profile that the store has now.
    """

    async def call() -> dict[str, Any]:
        async with connect(session.settings, start=False) as client:
            return await client.explain(name)

    report = asyncio.run(call())
    text = report_text(report)
    if page is not None:
        _write(page, page_html(report))
        text = f"written to {page}"
    session.terminal.answer(report, text)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CubecacheError(f"{path} cannot be written: {error.strerror}") from error
