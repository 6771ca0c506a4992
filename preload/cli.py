"""`cubecache preload`, `export`, `exports`, `unexport`: what goes through jobs and the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from imagecache.blockimage.keys import ImageKey
from imagecache.build.progress import Progress
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.errors import CubecacheError
from imagecache.facechoice import FaceChoice
from imagecache.leases.pins import pin as pin_image
from imagecache.session import Session, face_option, fill_option, json_option, platform_option
from imagecache.settings import Settings, parse_duration
from imagecache.terminal import Terminal, size_text, table_text
from preload.client import answers, connect
from preload.jobcommands import jobs
from preload.planning import Experience, look
from preload.profiling import explain, prepare_here, profile
from preload.upgrading import upgrade


def register(group: click.Group) -> None:
    """Adds this package's commands."""
    for command in (preload, jobs, export, exports, unexport, profile, explain, upgrade):
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
    "  cubecache preload oci:./image:latest docker-archive:saved.tar --json\n"
    "  cubecache preload --dry-run docker.io/library/nginx:1.27\n"
    "  cubecache preload --detach --priority 5 --pin 7d docker.io/library/nginx:1.27"
)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@platform_option
@face_option
@click.option("--dry-run", is_flag=True, help="Say what would be downloaded and stored, no more.")
@click.option("--detach", is_flag=True, help="Leave it to the daemon: `cubecache jobs`.")
@click.option(
    "--priority", type=click.IntRange(-100, 100), default=0, help="Higher goes first (daemon)."
)
@click.option(
    "--reference",
    "related",
    multiple=True,
    metavar="IMAGE",
    help="A preloaded image whose chunks need not be stored again; repeatable.",
)
@click.option("--pin", metavar="TIME", help="Keep the images for so long, as in 12h or 7d.")
@json_option
@click.pass_obj
def preload(
    session: Session,
    *,
    images: tuple[str, ...],
    platform: str | None,
    face: str,
    dry_run: bool,
    detach: bool,
    priority: int,
    related: tuple[str, ...],
    pin: str | None,
) -> None:
    """Pull, flatten and store images, so that they start at once later.

    An image that is there already costs one look-up; a layer that is there is neither pulled nor
    converted again. An interrupted preload resumes. Where a daemon runs on this state directory
    it does the work, one image after the other; its jobs survive it.
    """
    requests = [ImageRequest.parse(image, platform, face, related) for image in images]
    if dry_run:
        asyncio.run(_plan(session, requests))
        return
    order = _Order(requests, priority, parse_duration(pin, "--pin") if pin else 0)
    asyncio.run(_detach(session, order) if detach else _preload(session, order))


@dataclass(frozen=True, slots=True)
class _Order:
    requests: list[ImageRequest]
    priority: int
    pin_seconds: int


async def _plan(session: Session, requests: list[ImageRequest]) -> None:
    known = Experience()
    if await answers(session.settings):
        async with connect(session.settings, start=False) as client:
            plans = await client.plan(requests)
    else:
        async with opened_catalog(session.settings) as (_, catalog):
            plans = [
                (await look(session.settings, catalog, request, known)).as_json()
                for request in requests
            ]
    for plan in plans:
        seconds = plan["seconds_estimate"]
        session.terminal.answer(
            plan,
            f"{plan['image']}: {plan['digest']}\n"
            + (
                "  is preloaded"
                if plan["present"]
                else f"  {plan['missing_layers']} of {plan['layers']} layers missing, "
                f"{size_text(plan['download_bytes'])} of {size_text(plan['total_bytes'])} to "
                f"download, about {size_text(plan['store_bytes_estimate'])} to store, "
                + ("time unknown" if seconds is None else f"about {seconds:.0f} s")
            ),
        )


async def _detach(session: Session, order: _Order) -> None:
    async with connect(session.settings, start=False) as client:
        jobs = await client.submit(
            order.requests, priority=order.priority, pin_seconds=order.pin_seconds
        )
    for job in jobs:
        session.terminal.answer(job, f"{job['id']}  {job['state']}  {job['image']}")


async def _preload(session: Session, order: _Order) -> None:
    failures: list[CubecacheError] = []
    async with AsyncExitStack() as stack:
        results = await _results(session, order, stack)
        for request, result in zip(order.requests, results, strict=True):
            try:
                answer = await result()
            except CubecacheError as error:
                if len(order.requests) == 1:
                    raise
                session.terminal.note(f"cubecache: {request.reference}: {error}")
                failures.append(error)
                continue
            session.terminal.answer(answer, _summary(answer))
    if failures:
        raise failures[0]


async def _results(
    session: Session, order: _Order, stack: AsyncExitStack
) -> list[Callable[[], Awaitable[dict[str, Any]]]]:
    """One call per image that brings its result: by the daemon, or here where none runs."""
    if not await answers(session.settings):
        return [
            partial(_here, session.settings, request, order.pin_seconds, session.terminal)
            for request in order.requests
        ]
    client = await stack.enter_async_context(connect(session.settings, start=False))
    jobs = await client.submit(
        order.requests, priority=order.priority, pin_seconds=order.pin_seconds
    )
    return [partial(client.wait, job, partial(show_job, session.terminal)) for job in jobs]


async def _here(
    settings: Settings, request: ImageRequest, pin_seconds: int, terminal: Terminal
) -> dict[str, Any]:
    def report(progress: Progress) -> None:
        label = f"{request.reference}: {progress.stage}"
        if progress.layer:
            label += f" layer {progress.layer} of {progress.layers}"
        terminal.progress(label, progress.done_bytes, progress.total_bytes)

    async with opened_catalog(settings) as (opened, catalog):
        built = (await build_image(settings, catalog, request, report)).as_json()
        if pin_seconds:
            choice = FaceChoice.parse(request.face)
            key = ImageKey(built["image"], choice.face, choice.options)
            await pin_image(catalog, await catalog.find_root(key), request.reference, pin_seconds)
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
@click.option("--writable", is_flag=True, help="Let clients write; it is lost by `unexport`.")
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
    writable: bool,
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
                writable=writable,
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
