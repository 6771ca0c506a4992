"""`cubecache preload`, `export`, `exports`, `unexport`: what goes through jobs and the daemon."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
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
from imagecache.oci.throttle import Throttle
from imagecache.session import Session, face_option, fill_option, json_option, platform_option
from imagecache.settings import Settings, parse_duration, parse_size
from imagecache.terminal import Terminal, size_text, table_text
from preload.client import absent, answers, connect
from preload.fanout import MergedProgress, Order, preload_on, read_token
from preload.jobcommands import jobs
from preload.planning import Experience, look
from preload.profiling import explain, prepare_here, profile
from preload.upgrading import upgrade
from preload.watching import watch


def register(group: click.Group) -> None:
    """Adds this package's commands."""
    for command in (preload, jobs, export, exports, unexport, profile, explain, upgrade, watch):
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
@click.option("--limit-rate", metavar="SIZE", help="Download no more a second, as in 20MiB.")
@click.option(
    "--warm",
    type=click.Choice(["whole", "hot"]),
    help="Into the daemon's cache too: all of it, or what a start reads.",
)
@click.option(
    "--on",
    "hosts",
    multiple=True,
    metavar="URL",
    help="By the daemon at https://HOST:PORT, on every one of them; repeatable.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="Holds the token for --on; default: CUBECACHE_TOKEN.",
)
@click.option("--ca-file", type=click.Path(path_type=Path), help="Certificates for --on.")
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
    limit_rate: str | None,
    warm: str | None,
    hosts: tuple[str, ...],
    token_file: Path | None,
    ca_file: Path | None,
) -> None:
    """Pull, flatten and store images, so that they start at once later.

    An image that is there already costs one look-up; a layer that is there is neither pulled nor
    converted again. An interrupted preload resumes. Where a daemon runs on this state directory
    it does the work; its jobs survive it. With --on, the daemons of other hosts do: each on its
    own, and a host that fails is told without holding up the others.
    """
    requests = [ImageRequest.parse(image, platform, face, related) for image in images]
    if dry_run:
        asyncio.run(_plan(session, requests))
        return
    order = Order(
        requests,
        priority=priority,
        pin_seconds=parse_duration(pin, "--pin") if pin else 0,
        limit_bytes_per_second=parse_size(limit_rate, "--limit-rate") if limit_rate else 0,
        warm=warm,
    )
    if hosts:
        asyncio.run(_preload_on(session, hosts, order, token_file, ca_file))
        return
    asyncio.run(_detach(session, order) if detach else _preload(session, order))


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
                + cost_text(plan)
            ),
        )


def cost_text(plan: dict[str, Any]) -> str:
    """What a plan would cost, where [prices] tells."""
    month, once = plan["month_cost_estimate"], plan["once_cost_estimate"]
    return "" if month is None else f", costs {month:.4f} a month and {once:.4f} once"


async def _detach(session: Session, order: Order) -> None:
    async with connect(session.settings, start=False) as client:
        jobs = await order.submit(client)
    for job in jobs:
        session.terminal.answer(job, f"{job['id']}  {job['state']}  {job['image']}")


async def _preload(session: Session, order: Order) -> None:
    failures: list[CubecacheError] = []
    async with AsyncExitStack() as stack:
        results = await preloads(session, order, stack)
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


async def preloads(
    session: Session, order: Order, stack: AsyncExitStack
) -> list[Callable[[], Awaitable[dict[str, Any]]]]:
    """One call per image that brings its result: by the daemon, or here where none runs."""
    if not await answers(session.settings):
        if order.warm:
            raise absent(session.settings.control_socket)  # there is no cache without it
        return [
            partial(_here, session.settings, request, order, session.terminal)
            for request in order.requests
        ]
    client = await stack.enter_async_context(connect(session.settings, start=False))
    jobs = await order.submit(client)
    return [partial(client.wait, job, partial(show_job, session.terminal)) for job in jobs]


async def _here(
    settings: Settings, request: ImageRequest, order: Order, terminal: Terminal
) -> dict[str, Any]:
    def report(progress: Progress) -> None:
        label = f"{request.reference}: {progress.stage}"
        if progress.layer:
            label += f" layer {progress.layer} of {progress.layers}"
        terminal.progress(label, progress.done_bytes, progress.total_bytes)

    async with opened_catalog(settings) as (opened, catalog):
        everything = Throttle(lambda: settings.preload.bytes_per_second)
        throttle = Throttle(lambda: order.limit_bytes_per_second, above=everything)
        result = await build_image(settings, catalog, request, report, throttle=throttle)
        built = result.as_json()
        if order.pin_seconds:
            choice = FaceChoice.parse(request.face)
            root = await catalog.find_root(ImageKey(built["image"], choice.face, choice.options))
            await pin_image(catalog, root, request.reference, order.pin_seconds)
        await prepare_here(settings, opened, catalog, request)
        return built


async def _preload_on(
    session: Session,
    hosts: tuple[str, ...],
    order: Order,
    token_file: Path | None,
    ca_file: Path | None,
) -> None:
    def show(progress: MergedProgress) -> None:
        session.terminal.progress(
            f"{progress.ended} of {progress.jobs} done on {len(hosts)} hosts",
            progress.done_bytes,
            progress.total_bytes,
        )

    token = read_token(token_file) if token_file else os.environ.get("CUBECACHE_TOKEN")
    outcomes = await preload_on(hosts, order, token=token, ca_file=ca_file, on_progress=show)
    for outcome in outcomes:
        error = outcome.error
        ended = "done" if error is None else str(error)
        session.terminal.answer(outcome.as_json(), f"{outcome.host}  {outcome.image}  {ended}")
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed and failed[0].error is not None:
        count = f"{len(failed)} of {len(outcomes)} preloads failed"
        session.terminal.note(f"cubecache: {count}")
        raise failed[0].error


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
