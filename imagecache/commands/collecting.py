"""`cubecache gc` and `pin`: what stays in a realm, and what goes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import click

from imagecache.collect.plan import Policy
from imagecache.collect.report import CollectReport
from imagecache.collect.run import Collector, Wishes
from imagecache.commands.images import find_root
from imagecache.composition import opened_catalog
from imagecache.errors import UsageError
from imagecache.facechoice import FaceChoice
from imagecache.leases.clock import StoreClock
from imagecache.leases.pins import pin as pin_image
from imagecache.leases.pins import pins, unpin
from imagecache.session import Session, face_option, json_option
from imagecache.settings import parse_duration
from imagecache.terminal import size_text, table_text

SHOWN = 40


@click.command(
    epilog="\b\nExamples:\n  cubecache gc --dry-run\n  cubecache gc\n"
    "  cubecache gc --min-age 0 --grace 0   # repeated: all at once, when nobody else is there"
)
@click.option("--dry-run", is_flag=True, help="List what would be deleted, and do nothing.")
@click.option("--grace", default="24h", show_default=True, help="Between two steps of an object.")
@click.option("--min-age", default="24h", show_default=True, help="Of the generation in use.")
@click.option(
    "--yes-delete-many", is_flag=True, help="Also when it is over a fifth of the stored bytes."
)
@json_option
@click.pass_obj
def gc(session: Session, *, dry_run: bool, grace: str, min_age: str, yes_delete_many: bool) -> None:
    """Delete what no name, pin, export or build of the realm relies on.

    A collection moves generations on one step and deletes what earlier ones found unused; run it
    about once a day. What is dropped today is gone after some four graces.
    """
    wishes = Wishes(
        Policy(
            min_age=parse_duration(min_age, "--min-age", least=0),
            grace=parse_duration(grace, "--grace", least=0),
        ),
        dry_run=dry_run,
        delete_many=yes_delete_many,
    )

    async def collect() -> CollectReport:
        async with opened_catalog(session.settings) as (_, catalog):
            return await Collector(catalog, wishes).run()

    started = time.monotonic()
    report = asyncio.run(collect())
    answer = report.as_json() | {"seconds": round(time.monotonic() - started, 3)}
    session.terminal.answer(answer, _text(report))


def _text(report: CollectReport) -> str:
    lines = [f"{x['key']}  {size_text(x['bytes'])}  {x['why']}" for x in report.doomed[:SHOWN]]
    if len(report.doomed) > SHOWN:
        lines.append(f"... and {len(report.doomed) - SHOWN} more")
    if report.dry_run:
        lines.append(
            f"would delete {len(report.doomed)} objects, {size_text(report.doomed_bytes)} of "
            f"{size_text(report.stored_bytes)}, and bury {report.buried} packs for a later run"
        )
    else:
        lines.append(
            f"deleted {report.deleted} objects, {size_text(report.deleted_bytes)} of "
            f"{size_text(report.stored_bytes)}; buried {report.buried} packs for a later run; "
            f"{report.live_images} images are in use"
        )
    if report.states:
        lines.append("generations: " + ", ".join(report.states))
    lines += [f"problem: {problem}" for problem in report.problems]
    return "\n".join(lines)


@click.command(
    epilog="\b\nExamples:\n  cubecache pin docker.io/library/nginx:1.27 --ttl 30d\n"
    "  cubecache pin --list\n  cubecache pin --remove docker.io/library/nginx:1.27"
)
@click.argument("image", required=False)
@click.option("--ttl", default="30d", show_default=True, help="How long the pin holds.")
@click.option("--remove", is_flag=True, help="Remove the pin.")
@click.option("--list", "show", is_flag=True, help="List all pins.")
@face_option
@json_option
@click.pass_obj
def pin(
    session: Session, *, image: str | None, ttl: str, remove: bool, show: bool, face: str
) -> None:
    """Keep an image from collection for a time, whatever becomes of its names."""
    if show:
        _list(session)
        return
    if image is None:
        raise UsageError("pin needs an image", remedy="cubecache pin IMAGE, or --list")
    wanted = image
    seconds = parse_duration(ttl, "--ttl")

    async def change() -> dict[str, Any]:
        async with opened_catalog(session.settings) as (_, catalog):
            root = await find_root(catalog, wanted, FaceChoice.parse(face))
            if remove:
                await unpin(catalog, root.image)
            else:
                await pin_image(catalog, root, wanted, seconds)
            return {"image": root.image, "pinned": not remove, "ttl_seconds": seconds}

    answer = asyncio.run(change())
    session.terminal.answer(
        answer, f"{image}: no longer pinned" if remove else f"{image}: pinned for {ttl}"
    )


def _list(session: Session) -> None:
    async def gather() -> tuple[list[Any], float]:
        async with opened_catalog(session.settings) as (_, catalog):
            found = await pins(catalog)
            return found, await StoreClock(catalog).now() if found else 0.0

    found, now = asyncio.run(gather())
    answer = [
        {
            "image": pin.record.image,
            "name": pin.record.name,
            "seconds_left": max(0, round(pin.modified + pin.record.ttl_seconds - now)),
        }
        for pin in found
    ]
    rows = [("NAME", "IMAGE", "LEFT")]
    rows += [
        (x["name"], x["image"].partition(":")[2][:12], f"{x['seconds_left'] // 3600} h")
        for x in answer
    ]
    session.terminal.answer(answer, table_text(rows))
