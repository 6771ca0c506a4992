"""What an export is made of while it is served: image map, device, overlay, socket, fill, start."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.cache.arena import Arena
from imagecache.cache.device import BlockImageDevice, open_device
from imagecache.cache.fetch import Fetcher
from imagecache.cache.fill import Fill, FillMode, default_mode
from imagecache.cache.image import ImageMap
from imagecache.cache.objects import ObjectCache
from imagecache.catalog import Catalog
from imagecache.daemon.exports import ExportView, LiveExport
from imagecache.daemon.exporttable import ExportRecord
from imagecache.daemon.listening import Sockets
from imagecache.daemon.recording import StartKeeper
from imagecache.errors import CubecacheError, Unavailable
from imagecache.oci.throttle import Throttle
from imagecache.profile.prepare import ImageNames
from imagecache.profile.starts import KnownStart
from imagecache.settings import Settings
from imagecache.store.opened import OpenedStore
from nbdserver.overlay import OverlayDevice, OverlayError
from nbdserver.server import Server


class ImageMaps:
    """Decoded maps of block images, one per image; from this host where its objects are here."""

    def __init__(self, catalog: Catalog, objects: ObjectCache) -> None:
        self.catalog = catalog
        self.objects = objects
        self._maps: dict[str, ImageMap] = {}

    @classmethod
    def of(cls, settings: Settings, opened: OpenedStore) -> ImageMaps:
        """The maps of the realm's images, over the objects that this host keeps."""
        catalog = Catalog(opened.store, settings.realm, opened.seals)
        return cls(catalog, ObjectCache(settings.state_dir / "objects", opened.store))

    async def get(self, record: ImageNames) -> ImageMap:
        """The map of a block image; raises what the store answers where it has to be asked."""
        image = self._maps.get(record.block_image)
        if image is None:
            name, table = bytes.fromhex(record.block_image), bytes.fromhex(record.locations)
            keys, generation = self.catalog.keys, record.generation
            manifest, locations = await asyncio.gather(
                self.objects.get(keys.sealed("manifests", name, generation), name),
                self.objects.get(keys.sealed("locations", table, generation), table),
            )
            image = await asyncio.to_thread(
                lambda: ImageMap(
                    BlockManifest.decode(manifest),
                    LocationTable.decode(locations),
                    self.catalog.keys.pack,
                    self.catalog.seals,
                )
            )
            self._maps[record.block_image] = image
        return image

    def forget(self, block_image: str) -> None:
        """Nobody serves it any more."""
        self._maps.pop(block_image, None)


class Attachments:
    """Opens and closes what exports are made of; the exports themselves are the service's."""

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        maps: ImageMaps,
        arena: Arena,
        fetcher: Fetcher,
        starts: StartKeeper,
        nbd: Server,
        sockets: Sockets,
        live: dict[str, LiveExport],
    ) -> None:
        self.maps = maps
        self.sockets = sockets
        self._settings = settings
        self._arena = arena
        self._fetcher = fetcher
        self._starts = starts
        self._nbd = nbd
        self._live = live

    async def attach(
        self,
        export: LiveExport,
        *,
        recording: bool = False,
        known: asyncio.Task[KnownStart | None] | None = None,
    ) -> None:
        """Opens the device and its socket, and begins; leaves nothing behind where it raises."""
        await self.open(export)
        record = export.record
        if record.socket is not None and export.listener is None:
            try:
                view = ExportView(self._live, record.name)
                export.listener = self.sockets.listen_unix(Path(record.socket), view)
            except CubecacheError:
                await self._close_devices(export)
                raise
        self.begin(export, recording=recording, known=known)

    async def open(self, export: LiveExport) -> None:
        """Opens the device alone: nothing is fetched, nobody is let in."""
        record = export.record
        export.image = await self.maps.get(record)
        device = open_device(
            export.image,
            self._arena,
            self._fetcher,
            description=f"{record.reference} {record.image}",
            read_ahead=self._settings().cache.read_ahead,
        )
        if record.writable:
            try:
                export.overlay = await asyncio.to_thread(self._overlay, record, device)
            except BaseException:
                await device.close()
                raise
        export.device = device

    def begin(
        self,
        export: LiveExport,
        *,
        recording: bool = False,
        known: asyncio.Task[KnownStart | None] | None = None,
    ) -> None:
        """Begins to bring what an open export's start will read, then to fill."""
        record, image, settings = export.record, export.image, self._settings()
        assert image is not None and export.device is not None
        mode = FillMode(record.fill) if record.fill else default_mode(image, self._arena)
        export.fill = Fill(
            image,
            self._fetcher,
            mode=mode,
            bytes_per_second=settings.cache.fill_bytes_per_second,
        )
        export.start = self._starts.begin(
            record, image, export.fill, known=known, recording=recording
        )
        export.start.watch_device(export.device)
        export.failure = None

    async def warm(
        self, names: ImageNames, reference: str, mode: FillMode, throttle: Throttle
    ) -> None:
        """Brings an image that nobody exports into the arena; Unavailable where it does not fit.

        `hot` is what its start is known to read, and the file system's own blocks.
        """
        image = await self.maps.get(names)
        known = await self._starts.look_up(reference, names)
        wanted = {entry.digest for entry in known.boot.entries} if known and known.boot else set()
        hot = [n for n, digest in enumerate(image.digests()) if digest in wanted]
        hot += image.ordinals_in(0, image.metadata_bytes)
        fill = Fill(image, self._fetcher, mode=mode, hot=hot, bytes_per_second=throttle.rate)
        fill.start()
        try:
            progress = await fill.wait()
        finally:
            await fill.stop()
        if progress.chunks < progress.chunks_total:
            raise Unavailable(
                f"{reference}: {progress.chunks} of {progress.chunks_total} chunks are in the "
                f"cache: {progress.error or 'it takes no more'}",
                remedy="raise cache.budget_bytes, or warm less",
            )

    def overlay_directory(self, name: str) -> Path:
        """Where a writable export keeps what was written."""
        return self._settings().state_dir / "overlays" / name

    def _overlay(self, record: ExportRecord, base: BlockImageDevice) -> OverlayDevice:
        path, identity = self.overlay_directory(record.name), bytes.fromhex(record.block_image)
        quota = self._settings().cache.overlay_bytes or None
        try:
            if not (path / "journal").exists():
                OverlayDevice.create(path, base=base, identity=identity)
            return OverlayDevice.open(path, base=base, identity=identity, quota_bytes=quota)
        except OverlayError as error:
            raise Unavailable(f"export {record.name}: {error}") from error
        except OSError as error:
            raise Unavailable(f"overlay {path}: {error.strerror}") from error

    async def detach(self, export: LiveExport, *, forget: bool = False) -> None:
        """Ends clients, then everything else; `forget`: what was written goes too."""
        if export.listener is not None:
            self.sockets.stop(export.listener)
            export.listener = None
        if export.served is not None:
            await self._nbd.withdraw(export.served)
        if export.start is not None:
            await export.start.close()
            export.start = None
        if export.fill is not None:
            await export.fill.stop()
        await self._close_devices(export)
        if forget and export.record.writable:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(shutil.rmtree, self.overlay_directory(export.record.name))

    async def _close_devices(self, export: LiveExport) -> None:
        if export.overlay is not None:
            await export.overlay.close()
            export.overlay = None
        if export.device is not None:
            await export.device.close()
            export.device = None
