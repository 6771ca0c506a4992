"""What this daemon's exports rely on, told to collection by a lease, and followed when it moves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.records import RootRecord
from imagecache.cache.objects import ObjectCache
from imagecache.catalog import Catalog
from imagecache.daemon.exports import LiveExport
from imagecache.daemon.exporttable import ExportRecord
from imagecache.errors import CubecacheError, NotFound
from imagecache.leases.reader import Held, ReaderLease

log = logging.getLogger(__name__)

ROUNDS = 3


class ExportHolding:
    """Keeps the reader lease in step with the exports; never in the way of one being made."""

    def __init__(
        self,
        catalog: Catalog,
        objects: ObjectCache,
        live: Mapping[str, LiveExport],
        save: Callable[[ExportRecord], Awaitable[None]],
    ) -> None:
        """`live` is the service's own table; `save` keeps a record that has moved."""
        self._catalog = catalog
        self._objects = objects
        self._live = live
        self._save = save
        self._lease = ReaderLease(catalog)
        self._task: asyncio.Task[None] | None = None
        self._again = False

    def start(self) -> None:
        """Leases what is exported, and renews until `close`."""
        self._lease.start(self._follow)
        self.changed()

    def changed(self) -> None:
        """The exports are others than before; the lease follows in the background."""
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._update(), name="reader lease update")

    async def _update(self) -> None:
        while self._again:
            self._again = False
            try:
                for _ in range(ROUNDS):
                    stale = await self._lease.hold(self._held())
                    if not stale:
                        break
                    await self._follow(stale)
            except CubecacheError as error:
                log.warning("what is exported is not leased yet: %s", error)

    def _held(self) -> list[Held]:
        return [
            Held(
                export.record.image,
                export.record.generation,
                tuple(pack.hex() for pack in export.image.packs),
            )
            for export in self._live.values()
            if export.image is not None
        ]

    async def _follow(self, stale: list[Held]) -> None:
        """Looks up again what a collection has moved."""
        moved = {(claim.image, claim.generation) for claim in stale}
        for export in list(self._live.values()):
            if (export.record.image, export.record.generation) in moved:
                try:
                    await self.relocate(export)
                except CubecacheError as error:
                    log.error("export %s: %s", export.record.name, error)

    async def relocate(self, export: LiveExport) -> None:
        """Points an export at where its image is now; NotFound where it was collected."""
        record = export.record
        root = await self._find(record)
        if export.image is not None and root.locations != record.locations:
            name = bytes.fromhex(root.locations)
            key = self._catalog.keys.sealed("locations", name, root.generation)
            raw = await self._objects.get(key, name)
            export.image.relocate(await asyncio.to_thread(LocationTable.decode, raw))
        export.record = replace(record, generation=root.generation, locations=root.locations)
        await self._save(export.record)

    async def _find(self, record: ExportRecord) -> RootRecord:
        async for root in self._catalog.roots():
            if root.block_image == record.block_image and root.image == record.image:
                return root
        raise NotFound(
            f"image {record.image} was collected",
            remedy=f"cubecache preload {record.reference}",
        )

    async def close(self, *, keep: bool = False) -> None:
        """Ends the lease, so that what was read here may be collected at once.

        `keep`: a successor reads on; the lease runs out once the successor's own has begun.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._lease.close(keep=keep)
