"""First starts: images that are being built here and can be read before they are stored."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from imagecache.blockimage.envelope import seal
from imagecache.blockimage.keys import RealmKeys
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.records import RootRecord
from imagecache.build.spooled import SpooledImage, SpooledPacks, SpoolServing
from imagecache.cache.objects import ObjectCache
from imagecache.composition import ImageRequest
from imagecache.daemon.exports import LiveExport
from imagecache.daemon.exporttable import ExportRecord
from imagecache.errors import CubecacheError

log = logging.getLogger(__name__)


class FirstStarts:
    """What of the running build can be exported, and the exports made of it.

    Such an export is kept across restarts only once its image is committed. Where a build fails,
    its exports go on from the spool until they are ended.
    """

    def __init__(
        self,
        packs: SpooledPacks,
        objects: ObjectCache,
        keys: RealmKeys,
        live: Mapping[str, LiveExport],
        save: Callable[[ExportRecord], Awaitable[None]],
    ) -> None:
        """`live` is the service's own table; `save` keeps a record across restarts."""
        self.packs = packs
        self._objects = objects
        self._keys = keys
        self._live = live
        self._save = save
        self._images: dict[ImageRequest, SpooledImage] = {}
        self._building = 0

    def find(self, request: ImageRequest) -> SpooledImage | None:
        """The image of an equal request, if it is being built and can be read."""
        return self._images.get(request)

    @asynccontextmanager
    async def building(
        self, request: ImageRequest, readable: Callable[[], None]
    ) -> AsyncIterator[SpoolServing]:
        """What a build is given; `readable` is called once the image can be exported.

        The body has to call `stored` with the root before it ends; else the build has failed.
        """

        async def on_readable(image: SpooledImage) -> None:
            for path in image.objects:
                name, sealed = await asyncio.to_thread(_sealed, path)
                await self._objects.put(name, sealed)
            self._images[request] = image
            log.info("%s can be read; it is not stored yet", request.reference)
            readable()

        self._building += 1
        try:
            yield SpoolServing(self.packs, on_readable)
        except BaseException as error:
            self._failed(self._images.get(request), error)
            raise
        finally:
            self._building -= 1
            self._images.pop(request, None)
            await self.release()

    def _failed(self, image: SpooledImage | None, error: BaseException) -> None:
        for export in self._waiting():
            if image is not None and export.record.block_image == image.root.block_image:
                export.failure = f"its image is not stored: {error or type(error).__name__}"

    async def stored(self, root: RootRecord) -> None:
        """The image is committed: its exports are as any others from here on."""
        for export in self._waiting():
            record = export.record
            if (record.image, record.block_image) != (root.image, root.block_image):
                continue
            try:
                if export.image is not None and record.locations != root.locations:
                    export.image.relocate(await self._locations(root))
                export.record = replace(
                    record, generation=root.generation, locations=root.locations
                )
                await self._save(export.record)
            except CubecacheError as error:
                log.warning("export %s is not kept: %s", record.name, error)
                export.failure = str(error)
                continue
            export.stored, export.failure = True, None

    async def _locations(self, root: RootRecord) -> LocationTable:
        name = bytes.fromhex(root.locations)
        key = self._keys.sealed("locations", name, root.generation)
        raw = await self._objects.get(key, name)
        return await asyncio.to_thread(LocationTable.decode, raw)

    async def release(self) -> None:
        """Lets go of packs that no export needs, unless a build may still need them."""
        if self._building:
            return
        needed = {
            export.image.pack_key(pack)
            for export in self._waiting()
            if export.image is not None
            for pack in export.image.packs
        }
        await self.packs.keep(needed)

    def _waiting(self) -> list[LiveExport]:
        return [export for export in self._live.values() if not export.stored]


def _sealed(path: Path) -> tuple[bytes, bytes]:
    return seal(path.read_bytes())
