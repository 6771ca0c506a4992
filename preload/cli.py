"""`cubecache preload`, `export`, `exports`, `unexport`: what goes through jobs and the daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from imagecache.build.progress import Progress
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.errors import CubecacheError
from imagecache.session import Session, face_option, fill_option, json_option, platform_option
from imagecache.settings import Settings
from imagecache.terminal import Terminal, size_text, table_text
from preload.client import answers, connect
from preload.profiling import explain, prepare_here, profile


def register(group: click.Group) -> None:
    """Adds this package's commands."""
    for command in (preload, export, exports, unexport, profile, explain):
        group.add_command(command)


def show_job(terminal: Terminal, job: dict[str, Any]) -> None:
    """Draws a job's progress."""
    progress = job["progress"]
    if progress is None:
        terminal.progress(f"{job['image']}: {job['state']}", 0, 0)
        return
    label = f"{job['image']}: {progress['stage']}"
    if progress["layer"]:
        label += f" layer {progress['layer']} of {progress['layers']}"
    terminal.progress(label, progress["done_bytes"], progress["total_bytes"])


@click.command(
    epilog="\b\nExamples:\n  cubecache preload docker.io/library/nginx:1.27\n"
    "  cubecache preload oci:./image:latest docker-archive:saved.tar --json"
)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@platform_option
@face_option
@json_option
@click.pass_obj
def preload(session: Session, *, images: tuple[str, ...], platform: str | None, face: str) -> None:
    """Pull, flatten and store images, so that they start at once later.

    An image that is there already costs one look-up; a layer that is there is neither pulled nor
    converted again. An interrupted preload resumes. Where a daemon runs on this state directory
    it does the work.
    """
    requests = [ImageRequest.parse(image, platform, face) for image in images]
    asyncio.run(_preload(session, requests))


async def _preload(session: Session, requests: list[ImageRequest]) -> None:
    failures: list[CubecacheError] = []
    by_daemon = await answers(session.settings)
    for request in requests:
        try:
            if by_daemon:
                async with connect(session.settings, start=False) as client:
                    result = await client.preload(
                        request, lambda job: show_job(session.terminal, job)
                    )
            else:
                result = await _here(session.settings, request, session.terminal)
        except CubecacheError as error:
            if len(requests) == 1:
                raise
            session.terminal.note(f"cubecache: {request.reference}: {error}")
            failures.append(error)
            continue
        session.terminal.answer(result, _summary(result))
    if failures:
        raise failures[0]


async def _here(settings: Settings, request: ImageRequest, terminal: Terminal) -> dict[str, Any]:
    def report(progress: Progress) -> None:
        label = f"{request.reference}: {progress.stage}"
        if progress.layer:
            label += f" layer {progress.layer} of {progress.layers}"
        terminal.progress(label, progress.done_bytes, progress.total_bytes)

    async with opened_catalog(settings) as (opened, catalog):
        built = (await build_image(settings, catalog, request, report)).as_json()
        await prepare_here(settings, opened, catalog, request)
        return built


def _summary(result: dict[str, Any]) -> str:
    return (
        f"{result['name']}: {result['image']}\n"
        f"  block image {result['block_image']}, disk {size_text(result['size_bytes'])}, "
        f"{result['chunks']} chunks\n"
        f"  {result['new_layers']} of {result['layers']} layers and {result['new_chunks']} chunks "
        f"new, {size_text(result['stored_bytes'])} stored, {result['seconds']:.1f} s"
    )


@click.command(
    epilog="\b\nExamples:\n  cubecache export docker.io/library/nginx\n"
    '  nbdinfo "$(cubecache export oci:./image:latest)"'
)
@click.argument("image")
@click.option("--socket", type=click.Path(path_type=Path), help="A socket of its own for it.")
@click.option("--name", help="The export's name; default: from the image's.")
@click.option("--record", is_flag=True, help="Record what the start reads: `cubecache profile`.")
@platform_option
@face_option
@fill_option
@json_option
@click.pass_obj
def export(
    session: Session,
    *,
    image: str,
    socket: Path | None,
    name: str | None,
    record: bool,
    platform: str | None,
    face: str,
    fill: str | None,
) -> None:
    """Serve an image over NBD and print the URI; preloads it first if nobody has."""

    async def call() -> dict[str, Any]:
        async with connect(session.settings, start=False) as client:
            handle = await client.export(
                image,
                socket=socket,
                name=name,
                fill=fill,
                record=record,
                platform=platform,
                face=face,
                on_progress=lambda job: show_job(session.terminal, job),
            )
            return handle.fields

    answer = asyncio.run(call())
    session.terminal.answer(answer, answer["uri"])


@click.command(epilog="\b\nExamples:\n  cubecache exports --json")
@json_option
@click.pass_obj
def exports(session: Session) -> None:
    """List what the daemon exports."""

    async def call() -> list[dict[str, Any]]:
        async with connect(session.settings, start=False) as client:
            return await client.exports()

    answer = asyncio.run(call())
    rows = [("NAME", "IMAGE", "SIZE", "CLIENTS", "STATE", "URI")]
    rows += [
        (
            item["name"],
            item["reference"],
            size_text(item["size_bytes"]),
            str(item["clients"]),
            item["state"],
            item["uri"],
        )
        for item in answer
    ]
    session.terminal.answer(answer, table_text(rows))


@click.command(epilog="\b\nExamples:\n  cubecache unexport nginx-0123456789ab")
@click.argument("name")
@click.option("--force", is_flag=True, help="Even while clients are attached.")
@json_option
@click.pass_obj
def unexport(session: Session, *, name: str, force: bool) -> None:
    """End an export."""

    async def call() -> None:
        async with connect(session.settings, start=False) as client:
            await client.unexport(name, force=force)

    asyncio.run(call())
    session.terminal.answer({"unexported": name}, f"unexported {name}")
