"""`cubecache scrub`, `repair` and `stats`: the state of a realm, and mending it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from imagecache.accounting import Accountant, Prices, RealmAccount
from imagecache.blockimage.records import AliasRecord
from imagecache.catalog import AliasName
from imagecache.commands.verifying import pinned
from imagecache.composition import (
    ImageRequest,
    alias_name,
    build_image,
    opened_catalog,
)
from imagecache.errors import Corrupt, UsageError
from imagecache.facechoice import FaceChoice
from imagecache.oci.reference import parse_reference
from imagecache.repair.repairer import Broken, Repairer, RepairReport
from imagecache.repair.scrub import Scrubber, ScrubReport, ScrubWishes
from imagecache.session import Session, json_option
from imagecache.settings import parse_size
from imagecache.terminal import size_text, table_text

SHOWN = 20
_FACES = tuple(
    (FaceChoice.parse(text).face, FaceChoice.parse(text).options) for text in ("erofs", "ext4")
)


@click.command(
    epilog="\b\nExamples:\n  cubecache scrub\n  cubecache scrub --share 0.05 --rate 20MiB"
)
@click.option("--share", default=1.0, show_default=True, help="Of the packs to read, 0 to 1.")
@click.option("--rate", metavar="SIZE", help="Bytes per second at the most.")
@click.option("--packs", default=0, help="Packs to read at the most; the next run goes on there.")
@click.option("--from-start", is_flag=True, help="Not from where the last scrub ended.")
@json_option
@click.pass_obj
def scrub(session: Session, *, share: float, rate: str | None, packs: int, from_start: bool) -> int:
    """Read what the realm stores and check it; what is damaged is quarantined.

    Exit code 74 where damage was found.
    """
    if not 0 < share <= 1 or packs < 0:
        raise UsageError("--share is above 0 and at most 1, --packs not negative")
    wishes = ScrubWishes(share, parse_size(rate, "--rate") if rate else 0, packs, from_start)

    async def read() -> ScrubReport:
        async with opened_catalog(session.settings) as (opened, catalog):
            return await Scrubber(catalog, opened.reader, wishes).run()

    report = asyncio.run(read())
    lines = [f"{found.key}: {found.what}" for found in report.damage[:SHOWN]]
    lines.append(
        f"{report.packs} packs and {report.objects} objects, {size_text(report.read_bytes)} read: "
        + (f"{len(report.damage)} damaged; cubecache repair" if report.damage else "all intact")
        + ("" if report.whole else "; the next scrub goes on from here")
    )
    session.terminal.answer(report.as_json(), "\n".join(lines))
    return 74 if report.damage else 0


@click.command(
    epilog="\b\nExamples:\n  cubecache repair\n"
    "  cubecache repair --read-all docker.io/library/nginx:1.27"
)
@click.argument("image", required=False)
@click.option("--read-all", is_flag=True, help="Read every chunk first; slow, and misses nothing.")
@click.option("--drop", is_flag=True, help="Give up records that cannot be read or derived again.")
@json_option
@click.pass_obj
def repair(session: Session, *, image: str | None, read_all: bool, drop: bool) -> None:
    """Build damaged images again from their registry; the same digests, or nothing.

    Damage is what the last scrubs marked, and what is missing, too short or unreadable.
    """
    settings = session.settings

    async def mend() -> RepairReport:
        async with opened_catalog(settings) as (opened, catalog):
            only = None
            if image is not None:
                only = await catalog.resolve_name(alias_name(parse_reference(image)))

            async def rebuild(name: AliasRecord, found: Broken) -> str:
                free = json.loads(found.options).get("free_bytes", 0)
                face = str(FaceChoice(found.face, free))
                platform = found.root.platform if found.root else None
                request = ImageRequest(pinned(name.name, found.image), platform, face)
                alias = alias_name(parse_reference(name.name))
                result = await build_image(
                    settings,
                    catalog,
                    request,
                    lambda step: session.terminal.progress(
                        f"{name.name}: {step.stage}", step.done_bytes, step.total_bytes
                    ),
                    alias=AliasName(alias.repository, alias.tag, name.name),
                    distrusted=found.packs,
                )
                if result.image != found.image:
                    raise Corrupt(f"{name.name} is {result.image} by now")
                return result.block_image

            return await Repairer(
                catalog, opened.reader, rebuild, faces=_FACES, read_all=read_all, drop=drop
            ).run(only)

    report = asyncio.run(mend())
    if report.failed:
        what, why = next(iter(report.failed.items()))
        raise Corrupt(
            f"{len(report.failed)} not repaired, {len(report.repaired)} repaired; {what}: {why}",
            remedy="the image's source must still have it",
        )
    session.terminal.answer(
        report.as_json(),
        f"{report.images} images, {len(report.broken)} damaged, {len(report.repaired)} repaired; "
        f"{len(report.dropped)} unreadable records dropped",
    )


@click.command(epilog="\b\nExamples:\n  cubecache stats\n  cubecache stats --json --pulls 1000")
@click.option("--pulls", default=0, help="Full reads of every image a month, for the cost.")
@json_option
@click.pass_obj
def stats(session: Session, *, pulls: int) -> None:
    """Show what the realm holds, how much of it is shared, and what it costs by [prices]."""
    section = session.settings.prices
    prices = Prices(
        section.gib_month, section.thousand_writes, section.thousand_reads, section.gib_out
    )

    async def add_up() -> RealmAccount:
        async with opened_catalog(session.settings) as (_, catalog):
            return await Accountant(catalog).account()

    account = asyncio.run(add_up())
    answer: dict[str, Any] = account.as_json()
    answer["cost"] = account.cost(prices, pulls) if prices.known else None
    rows = [("NAME", "IMAGE", "LOGICAL", "ALONE", "STORED", "GETS", "LAYERS")]
    rows += [
        (
            ", ".join(image.names) or "<none>",
            image.image.partition(":")[2][:12],
            size_text(image.logical_bytes),
            size_text(image.alone_bytes),
            size_text(image.stored_bytes),
            str(image.requests),
            f"{sum(x['images'] > 1 for x in image.layers)} of {len(image.layers)} shared",
        )
        for image in account.images
    ]
    lines = [
        table_text(rows),
        f"logical {size_text(account.logical_bytes)}, unique {size_text(account.unique_bytes)} "
        f"(dedup {account.dedup:.2f}), stored {size_text(account.stored_bytes)} in "
        f"{account.objects} objects; garbage in packs "
        f"{size_text(account.pack_bytes - account.named_pack_bytes)}",
    ]
    if answer["cost"]:
        lines.append(", ".join(f"{name} {value:.4f}" for name, value in answer["cost"].items()))
    session.terminal.answer(answer, "\n".join(lines))
