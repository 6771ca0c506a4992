"""Copies one live image from a retired generation into the newest active one; the root goes last.

Packs are not copied: location tables go on naming them where they are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from imagecache.blockimage.envelope import MAX_PLAINTEXT, unseal
from imagecache.blockimage.keys import SealedKind
from imagecache.blockimage.manifest import BlockManifest
from imagecache.blockimage.records import MAX_RECORD, LayerRecord, RootRecord, StartRecord
from imagecache.catalog import Catalog
from imagecache.collect.plan import Copying
from imagecache.errors import Corrupt, LimitExceeded, NotFound
from imagecache.profile.boot import BootTable

MAX_BOOT_PACK = 256 << 20
"""A larger boot pack is left behind; the next prepared start makes another."""


class ImageCopier:
    """Copies images within one realm; remembers what it has copied."""

    def __init__(self, catalog: Catalog, fence: Callable[[], Awaitable[None]]) -> None:
        """`fence` raises where this collection may write no more."""
        self._catalog = catalog
        self._store = catalog.store
        self._keys = catalog.keys
        self._fence = fence
        self._done: set[str] = set()

    async def copy(self, work: Copying, root: RootRecord) -> None:
        """Copies one image; NotFound or Corrupt where a part of it is gone or damaged."""
        await self._fence()
        for blob in (root.image, root.config):
            await self._copy_blob(blob, work)
        manifest = BlockManifest.decode(
            await self._copy_sealed("manifests", bytes.fromhex(root.block_image), work)
        )
        await self._copy_sealed("locations", bytes.fromhex(root.locations), work)
        for layer in manifest.layers:
            await self._copy_sealed("indexes", layer.index, work)
        for diff_id in dict.fromkeys(root.layers):
            await self._copy_layer(diff_id, work)
        await self._fence()
        moved = replace(root, generation=work.target)
        await self._store.put(f"{self._keys.roots(work.target)}{work.name}", moved.encode())

    async def copy_starts(self, work: list[Copying]) -> None:
        """Copies what is known of the images' starts; what is missing of it is left behind."""
        for source, target in sorted({(each.source, each.target) for each in work}):
            images = {each.image.replace(":", "-") for each in work if each.source == source}
            prefix = f"{self._keys.within(source)}starts/"
            listed = [stat.key async for stat in self._store.list(prefix)]
            for key in listed:
                if key.rsplit("/", 1)[1].removesuffix(".json") in images:
                    try:
                        await self._copy_start(key, prefix, source, target)
                    except (NotFound, Corrupt, LimitExceeded):
                        continue  # a start is a hint: the next preload makes another

    async def _copy_blob(self, digest: str, work: Copying) -> None:
        where = self._keys.blob(digest, work.target)
        if where not in self._done:
            raw = await self._catalog.blob(digest, work.source)
            await self._store.put(where, raw)
            self._done.add(where)

    async def _copy_sealed(self, kind: SealedKind, name: bytes, work: Copying) -> bytes:
        sealed = await self._store.get(
            self._keys.sealed(kind, name, work.source), limit=MAX_PLAINTEXT
        )
        plaintext = unseal(sealed, name)
        where = self._keys.sealed(kind, name, work.target)
        if where not in self._done:
            await self._store.put(where, sealed)
            self._done.add(where)
        return plaintext

    async def _copy_layer(self, diff_id: str, work: Copying) -> None:
        """A layer record, unless the target has its own; without one the layer is built again."""
        where = self._keys.layer(diff_id, work.target)
        if where in self._done:
            return
        self._done.add(where)
        try:
            await self._store.stat(where)
            return
        except NotFound:
            pass
        try:
            record = LayerRecord.decode(
                await self._store.get(self._keys.layer(diff_id, work.source), limit=MAX_RECORD)
            )
            await self._copy_sealed("indexes", bytes.fromhex(record.index), work)
            await self._copy_sealed("locations", bytes.fromhex(record.locations), work)
        except NotFound:
            return
        await self._catalog.put_layer(record, work.target)

    async def _copy_start(self, key: str, prefix: str, source: int, target: int) -> None:
        where = f"{self._keys.within(target)}starts/{key.removeprefix(prefix)}"
        try:
            await self._store.stat(where)
            return
        except NotFound:
            pass
        raw = await self._store.get(key, limit=MAX_RECORD)
        record = StartRecord.decode(raw)
        profile = bytes.fromhex(record.profile)
        sealed = await self._store.get(self._keys.profile(profile, source), limit=MAX_PLAINTEXT)
        unseal(sealed, profile)
        await self._store.put(self._keys.profile(profile, target), sealed)
        if record.boot_table:
            name = bytes.fromhex(record.boot_table)
            table = await self._store.get(self._keys.boot_table(name, source), limit=MAX_PLAINTEXT)
            pack = BootTable.decode(unseal(table, name)).pack
            body = await self._store.get(self._keys.boot_pack(pack, source), limit=MAX_BOOT_PACK)
            await self._store.put(self._keys.boot_pack(pack, target), body)
            await self._store.put(self._keys.boot_table(name, target), table)
        await self._store.put(where, raw)
