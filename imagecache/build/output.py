"""What one build writes into the store: packs as they are made, then objects, then records."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagecache.blockimage.keys import SealedKind
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.records import LayerRecord
from imagecache.build.spooled import SpooledPacks
from imagecache.catalog import Catalog

UPLOADS = 4


class BuildOutput:
    """One build's writes into one generation; `stored_bytes` counts what the store took."""

    def __init__(
        self,
        catalog: Catalog,
        generation: int,
        marked: frozenset[str],
        tasks: asyncio.TaskGroup,
        spooled: SpooledPacks | None,
    ) -> None:
        """`marked` are packs found damaged, in hex; a failed upload ends `tasks`."""
        self.stored_bytes = 0
        self._catalog = catalog
        self._generation = generation
        self._marked = marked
        self._tasks = tasks
        self._spooled = spooled
        self._places = asyncio.Semaphore(UPLOADS)

    async def take_pack(self, event: dict[str, Any]) -> asyncio.Task[None]:
        """Begins to store a pack that the worker announced; from now on it can be read."""
        key = self._catalog.keys.pack(bytes.fromhex(event["name"]))
        if self._spooled is not None:
            await self._spooled.add(key, Path(event["path"]))
        return self._tasks.create_task(self._store_pack(key, event))

    async def _store_pack(self, key: str, event: dict[str, Any]) -> None:
        path = Path(event["path"])
        async with self._places:
            await self._catalog.store.put(key, path)
        if event["name"] in self._marked:  # what stood there was damaged, and is no more
            name = bytes.fromhex(event["name"])
            await self._catalog.store.delete(self._catalog.keys.quarantined(name))
        self.stored_bytes += event["length"]
        await asyncio.to_thread(path.unlink)
        if self._spooled is not None:
            await self._spooled.drop(key)

    async def put_sealed(self, kind: SealedKind, path: Path) -> bytes:
        """Seals and stores the object in a file; its name."""
        name, stored = await self._catalog.put_sealed(
            kind, await asyncio.to_thread(path.read_bytes), self._generation
        )
        self.stored_bytes += stored
        return name

    async def put_blob(self, digest: str, raw: bytes) -> None:
        """Keeps an OCI manifest or config."""
        await self._catalog.put_blob(digest, raw, self._generation)
        self.stored_bytes += len(raw)

    async def put_layer(
        self, diff_id: str, directory: Path, packs: Sequence[asyncio.Task[None]]
    ) -> None:
        """Stores a converted layer once its packs are stored, its record last."""
        if packs:
            await asyncio.wait(packs)
            for pack in packs:
                await pack
        index = await self.put_sealed("indexes", directory / "index")
        locations = await self.put_sealed("locations", directory / "locations")
        named = await asyncio.to_thread(_packs_named, directory / "locations")
        record = LayerRecord(diff_id, index.hex(), locations.hex(), named)
        await self._catalog.put_layer(record, self._generation)
        self.stored_bytes += len(record.encode())


def _packs_named(table: Path) -> tuple[str, ...]:
    return tuple(name.hex() for name in LocationTable.decode(table.read_bytes()).packs)
