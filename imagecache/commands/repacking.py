"""`cubecache repack`: packs that are mostly garbage give way to full ones."""

from __future__ import annotations

import asyncio

import click

from imagecache.collect.repack import Repacker, RepackReport, sparse_packs
from imagecache.composition import opened_catalog, prepare_state_dir
from imagecache.errors import Corrupt, UsageError
from imagecache.sealedwith import named_tables
from imagecache.session import Session, json_option
from imagecache.terminal import size_text


@click.command(epilog="\b\nExamples:\n  cubecache repack\n  cubecache repack --below 0.8 --json")
@click.option("--below", default=0.5, show_default=True, help="Of a pack that images still name.")
@json_option
@click.pass_obj
def repack(session: Session, *, below: float) -> None:
    """Copy what is alive of mostly dead packs into new ones; collections then free the old.

    Images keep their digests. Exports go on reading where they read.
    """
    if not 0 < below <= 1:
        raise UsageError("--below is above 0 and at most 1")
    settings = session.settings

    async def work() -> RepackReport:
        await asyncio.to_thread(prepare_state_dir, settings)
        async with opened_catalog(settings) as (opened, catalog):
            sparse = await sparse_packs(catalog, await named_tables(catalog), below)
            return await Repacker(
                catalog,
                opened.reader,
                scratch=settings.state_dir / "repack",
                wanted=lambda place: place.pack in sparse,
            ).run()

    report = asyncio.run(work())
    tell(session, report)


def tell(session: Session, report: RepackReport) -> None:
    """Prints a report; Corrupt where an image could not be re-packed."""
    if report.failed:
        what, why = next(iter(report.failed.items()))
        raise Corrupt(f"{len(report.failed)} images left as they were; {what}: {why}")
    left = f"; {len(report.left)} images wait for a collection" if report.left else ""
    session.terminal.answer(
        report.as_json(),
        f"{len(report.images)} images, {report.chunks} chunks, {size_text(report.moved_bytes)} "
        f"into {report.packs} packs, {report.records} records{left}",
    )
