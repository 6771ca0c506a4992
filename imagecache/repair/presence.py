"""Whether everything that an image names is there, and as long as it must be: no chunk is read."""

from __future__ import annotations

from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.blockimage.records import RootRecord
from imagecache.catalog import Catalog
from imagecache.collect.work import ForEach, in_parallel
from imagecache.errors import Corrupt, LimitExceeded, NotFound, Unsupported
from imagecache.packs.pack import TRAILER, read_trailer
from imagecache.repair.damage import Damage, quarantined, quarantined_packs
from imagecache.store.base import Priority, RangeReader

BROKEN = (NotFound, Corrupt, LimitExceeded, Unsupported)


class PresenceCheck:
    """Checks images of one realm; remembers packs and indexes that it has seen."""

    def __init__(
        self,
        catalog: Catalog,
        reader: RangeReader,
        for_each: ForEach = in_parallel,
        *,
        read_indexes: bool = False,
    ) -> None:
        """`read_indexes` holds layer indexes to their digests; else they must only be there."""
        self._read_indexes = read_indexes
        self._catalog = catalog
        self._store = catalog.store
        self._reader = reader
        self._for_each = for_each
        self._seen: dict[str, str | None] = {}  # key -> what is wrong with it
        self._marked: set[bytes] | None = None

    async def check(self, root: RootRecord) -> list[Damage]:
        """What an image lacks; Unavailable or Denied where the store could not be asked."""
        found: list[Damage] = []
        catalog, generation = self._catalog, root.generation
        for blob in (root.image, root.config):
            try:
                await catalog.blob(blob, generation)
            except BROKEN as error:
                found.append(Damage(catalog.keys.blob(blob, generation), str(error)))
        manifest = await self._manifest(root, found)
        table = await self._table(root, manifest, found)
        if manifest is not None:
            await self._indexes(manifest, generation, found)
        if table is not None:
            await self._packs(table, found)
            await self._quarantined(manifest, table, found)
        return found

    async def _manifest(self, root: RootRecord, found: list[Damage]) -> BlockManifest | None:
        try:
            return await self._catalog.block_manifest(root)
        except BROKEN as error:
            name = bytes.fromhex(root.block_image)
            key = self._catalog.keys.sealed("manifests", name, root.generation)
            found.append(Damage(key, str(error)))
            return None

    async def _table(
        self, root: RootRecord, manifest: BlockManifest | None, found: list[Damage]
    ) -> LocationTable | None:
        try:
            table = await self._catalog.location_table(root)
            if manifest is not None and len(table) != len(manifest.chunks):
                raise Corrupt("the location table is of another block image")
            return table
        except BROKEN as error:
            name = bytes.fromhex(root.locations)
            key = self._catalog.keys.sealed("locations", name, root.generation)
            found.append(Damage(key, str(error)))
            return None

    async def _indexes(self, manifest: BlockManifest, generation: int, found: list[Damage]) -> None:
        async def look(name: bytes) -> None:
            key = self._catalog.keys.sealed("indexes", name, generation)
            if key not in self._seen:
                self._seen[key] = await self._index_fault(key, name, generation)
            fault = self._seen[key]
            if fault is not None:
                found.append(Damage(key, fault))

        await self._for_each(look, dict.fromkeys(layer.index for layer in manifest.layers))

    async def _index_fault(self, key: str, name: bytes, generation: int) -> str | None:
        try:
            if self._read_indexes:
                await self._catalog.sealed("indexes", name, generation)
            return None if (await self._store.stat(key)).size else "it is empty"
        except NotFound:
            return "it is missing"
        except BROKEN as error:
            return str(error)

    async def _packs(self, table: LocationTable, found: list[Damage]) -> None:
        ends = dict.fromkeys(range(len(table.packs)), 0)
        for ordinal, pack in enumerate(table.pack_ordinals):
            end = table.offsets[ordinal] + table.stored_lengths[ordinal]
            ends[pack] = max(ends[pack], end)

        async def look(number: int) -> None:
            key = self._catalog.keys.pack(table.packs[number])
            if key not in self._seen:
                self._seen[key] = await self._pack_fault(key, ends[number])
            fault = self._seen[key]
            if fault is not None:
                found.append(Damage(key, fault))

        await self._for_each(look, ends)

    async def _pack_fault(self, key: str, end: int) -> str | None:
        try:
            size = (await self._store.stat(key)).size
            if size < end + TRAILER.size:
                return f"it has {size} bytes and needs more than {end}"
            trailer = await self._reader.read(
                key, size - TRAILER.size, TRAILER.size, priority=Priority.FILL
            )
            read_trailer(trailer, size)
        except NotFound:
            return "it is missing"
        except Corrupt as error:
            return f"it is cut short: {error.message}"
        return None

    async def _quarantined(
        self, manifest: BlockManifest | None, table: LocationTable, found: list[Damage]
    ) -> None:
        if self._marked is None:
            self._marked = await quarantined_packs(self._catalog)
        if manifest is None:
            return
        for number, pack in enumerate(table.packs):
            if pack not in self._marked:
                continue
            marked = set(await quarantined(self._catalog, pack))
            chunks = tuple(
                manifest.chunks.digest(ordinal)
                for ordinal in range(len(table))
                if table.pack_ordinals[ordinal] == number
                and manifest.chunks.digest(ordinal) in marked
            )
            if chunks:
                key = self._catalog.keys.pack(pack)
                found.append(Damage(key, "chunks of it are quarantined", chunks))
