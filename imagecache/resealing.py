"""Finishing a rotation: what an older secret seals is sealed with the one in use.

Images through `imagecache.collect.repack`, their starts by building them again from their profiles,
names and pins by being written again. What lies in generations that are not written any more goes
with them, by collection.
"""

from __future__ import annotations

from pathlib import Path

from imagecache.catalog import Catalog
from imagecache.collect.repack import Repacker, RepackReport, reseal_records
from imagecache.errors import CubecacheError, UsageError
from imagecache.leases.build import BuildLeases
from imagecache.profile.prepare import StartBuilder, load_image
from imagecache.profile.starts import Starts
from imagecache.store.base import RangeReader
from imagecache.store.sealed import SealedStore


async def reseal(
    catalog: Catalog, reader: RangeReader, *, scratch: Path, leases: BuildLeases | None = None
) -> RepackReport:
    """Seals a realm anew; may be killed and run again.

    Raises UsageError for a realm that is not sealed, Unavailable or Denied of the store.
    """
    store, active = catalog.store, catalog.seals.active
    if not isinstance(store, SealedStore):
        raise UsageError("the realm is not sealed", remedy="set [encryption] secrets")
    repacker = Repacker(
        catalog,
        reader,
        scratch=scratch / "packs",
        wanted=lambda place: place.key_id != active,
        leases=leases,
        rewrite=True,
    )
    report = await repacker.run()
    await _starts(catalog, reader, scratch / "starts", report)
    report.records = await reseal_records(catalog, store.key_id_of)
    return report


async def _starts(
    catalog: Catalog, reader: RangeReader, scratch: Path, report: RepackReport
) -> None:
    starts = Starts(catalog)
    builder = StartBuilder(catalog, starts, reader, scratch=scratch)
    roots = {root.block_image: root async for root in catalog.roots()}
    for alias in await catalog.aliases():
        known = await starts.find(alias.repository, alias.image)
        root = roots.get(known.record.block_image) if known is not None else None
        if known is None or root is None or not known.own or root.image != alias.image:
            continue
        try:
            await builder.build(alias.repository, await load_image(catalog, root), known.profile)
        except CubecacheError as error:
            report.failed[f"the start of {alias.name}"] = str(error)
