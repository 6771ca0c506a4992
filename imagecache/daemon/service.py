"""The service: arena, fetcher, exports, NBD sockets and jobs of one host, wired and owned."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from typing import Any

from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.records import RootRecord
from imagecache.build.progress import BuildResult, Report
from imagecache.build.spooled import SpooledPacks, SpoolReader
from imagecache.cache.arena import Arena
from imagecache.cache.fetch import Fetcher
from imagecache.cache.fill import FillMode
from imagecache.cache.settings import ArenaSettings, FetchSettings, Integrity
from imagecache.composition import (
    ImageRequest,
    alias_name,
    build_image,
    open_realm,
    prepare_state_dir,
)
from imagecache.daemon.attachments import Attachments, ImageMaps
from imagecache.daemon.builds import Builds
from imagecache.daemon.exportrequest import ExportRequest, run_config
from imagecache.daemon.exports import ExportView, LiveExport
from imagecache.daemon.exporttable import ExportRecord, ExportTable
from imagecache.daemon.firststart import FirstStarts
from imagecache.daemon.holding import ExportHolding
from imagecache.daemon.listening import Sockets
from imagecache.daemon.recording import ExportStart, StartKeeper
from imagecache.errors import Busy, CubecacheError, NotFound, Unavailable
from imagecache.facechoice import FaceChoice
from imagecache.leases.pins import pin
from imagecache.oci.reference import parse_reference
from imagecache.oci.throttle import Throttle
from imagecache.profile.prepare import prepare_quietly
from imagecache.settings import Settings
from imagecache.store.opened import OpenedStore
from nbdserver.limits import Limits
from nbdserver.server import Server
from preload.jobs import Job, JobQueue
from preload.jobtable import JobTable

__all__ = ["ExportRequest", "Service", "arena_settings"]

logger = logging.getLogger(__name__)


class Service:
    """One host's daemon. `open`, then serve until `close`."""

    def __init__(
        self,
        settings: Settings,
        opened: OpenedStore,
        arena: Arena,
        *,
        maps: ImageMaps | None = None,
        passed: list[socket.socket] | None = None,
    ) -> None:
        """Wires; nothing is read or served yet. `passed` are a service manager's sockets."""
        self.settings = settings
        self.opened = opened
        self.arena = arena
        maps = maps or ImageMaps.of(settings, opened)
        self.catalog, self.objects = maps.catalog, maps.objects
        self.packs = SpooledPacks(settings.state_dir / "spool" / "unstored")
        self.fetcher = Fetcher(
            SpoolReader(opened.reader, self.packs),
            arena,
            FetchSettings(
                stall_seconds=settings.cache.stall_seconds,
                # What queues inside the reader cannot be overtaken: ask for no more than it serves.
                demand_gets=8 if settings.store_url.startswith("file:") else 32,
            ),
        )
        self.starts = StartKeeper(
            self.catalog,
            self.objects,
            opened,
            arena,
            self.fetcher,
            scratch=settings.state_dir / "spool" / "boot",
        )
        self.builds = Builds()
        self.jobs = JobQueue(
            self.builds.counted(self._build),
            JobTable(settings.state_dir / "jobs.db"),
            quota=lambda: self.settings.preload.queued_per_owner,
            concurrency=lambda: self.settings.preload.concurrency,
        )
        self.throttle = Throttle(lambda: self.settings.preload.bytes_per_second)
        self.nbd = Server(limits=Limits())
        self.ready = False
        self.started = time.time()
        self._table = ExportTable(settings.state_dir / "exports.db")
        self._live: dict[str, LiveExport] = {}
        self.changing = asyncio.Lock()  # held while exports change, or move to another process
        self.passed_on = False  # a successor has the clients
        self.sockets = Sockets(self.nbd, passed)
        self.attachments = Attachments(
            settings=lambda: self.settings,
            maps=maps,
            arena=arena,
            fetcher=self.fetcher,
            starts=self.starts,
            nbd=self.nbd,
            sockets=self.sockets,
            live=self._live,
        )
        self.holding = ExportHolding(self.catalog, self.objects, self._live, self._keep)
        self.firsts = FirstStarts(
            self.packs, self.objects, self.catalog.keys, self._live, self._keep
        )

    async def _keep(self, record: ExportRecord) -> None:
        await asyncio.to_thread(self._table.save, record)

    @classmethod
    async def open(cls, settings: Settings, passed: list[socket.socket] | None = None) -> Service:
        """Wires everything and restores the exports; sockets listen after that.

        `passed` are a service manager's sockets. Raises Busy where another daemon holds the state
        directory.
        """
        await asyncio.to_thread(prepare_state_dir, settings)
        arena = await Arena.open(settings.state_dir / "arena", arena_settings(settings))
        opened = await open_realm(settings)
        service = cls(settings, opened, arena, passed=passed)
        try:
            await service._start()
        except BaseException:
            await service.close()
            raise
        return service

    async def _start(self) -> None:
        for record in await self.kept():
            export = self.restored(record)
            try:
                try:
                    await self.attachments.attach(export)
                except NotFound:
                    await self.holding.relocate(export)  # collected from while we were away
                    await self.attachments.attach(export)
            except CubecacheError as error:
                export.failure = str(error)
                logger.warning(
                    "export %s cannot be restored: %s",
                    record.name,
                    error,
                    extra={"export": record.name},
                )
        self.sockets.listen_unix(self.settings.nbd_socket, self.shared_view)
        if self.settings.nbd.tcp:
            self.sockets.listen_tcp(self.settings.nbd.tcp, self.shared_view)
        await self.begin_jobs()
        self.holding.start()
        self.ready = True

    async def begin_jobs(self) -> None:
        """Takes up the jobs; nobody else writes the state directory from here on."""
        await asyncio.to_thread(self.packs.clear)
        await self.jobs.start()

    async def kept(self) -> list[ExportRecord]:
        """The exports that are kept across restarts."""
        return await asyncio.to_thread(self._table.load)

    @property
    def shared_view(self) -> ExportView:
        """What the clients of the shared sockets may name."""
        return ExportView(self._live)

    def view_of(self, name: str) -> ExportView:
        """What the clients of an export's own socket may name."""
        return ExportView(self._live, name)

    def restored(self, record: ExportRecord) -> LiveExport:
        """A kept export, known and not served yet."""
        export = self._live[record.name] = LiveExport(record, self.settings.nbd_socket)
        return export

    async def _build(self, job: Job, report: Report) -> BuildResult:
        request = job.request
        throttle = Throttle(lambda: job.bytes_per_second, above=self.throttle)
        async with self.firsts.building(request, job.may_be_exported) as serving:
            built = await build_image(
                self.settings,
                self.catalog,
                request,
                report,
                serving=serving,
                throttle=throttle,
                slot=job.slot,
            )
            await self.firsts.stored(await self._root(request))
        if job.pin_seconds:
            name = request.reference
            await pin(self.catalog, await self._root(request), name, job.pin_seconds)
        await self._prepare_start(request)
        if job.warm:
            await self.attachments.warm(
                await self._root(request), request.reference, FillMode(job.warm), throttle
            )
        return built

    async def _prepare_start(self, request: ImageRequest) -> None:
        try:
            root = await self._root(request)
            repository = alias_name(parse_reference(request.reference)).repository
        except CubecacheError as error:
            logger.warning("no start is prepared for %s: %s", request.reference, error)
            return
        await prepare_quietly(self.starts.builder, repository, root)

    # --- exports ---

    def exports(self) -> list[LiveExport]:
        """Every export, by name."""
        return [self._live[name] for name in sorted(self._live)]

    async def export(self, request: ExportRequest) -> LiveExport:
        """Exports a committed image; the same request again is the same export.

        Raises NotFound where the image is not in the store, Busy where the name is another's.
        """
        request.check()
        first = None
        try:
            root = await self._root(request.image)
        except NotFound:
            first = self.firsts.find(request.image)
            if first is None:
                raise
            root = first.root
        name = request.name_for(root)
        async with self.changing:
            self._check_here()
            there = self._live.get(name)
            if there is not None:
                return await self._again(there, root, request)
            # All of these are round trips to the store: side by side.
            known = self.starts.look_up(request.image.reference, root)
            config, _ = await asyncio.gather(
                self._run_config(root, first.config if first else None),
                self.attachments.maps.get(root),
            )
            record = ExportRecord(
                name=name,
                reference=request.image.reference,
                image=root.image,
                config=config,
                face=root.face,
                block_image=root.block_image,
                locations=root.locations,
                realm=root.realm,
                generation=root.generation,
                size_bytes=root.size_bytes,
                socket=request.socket,
                fill=request.fill or self.settings.cache.fill,
                owner=request.owner,
                writable=int(request.writable),
            )
            export = LiveExport(record, self.settings.nbd_socket, stored=first is None)
            await self.attachments.attach(export, recording=request.record, known=known)
            if first is None:
                await asyncio.to_thread(self._table.save, record)
            self._live[name] = export
            self.holding.changed()
            logger.info("export %s of %s", name, root.image, extra={"export": name})
            return export

    async def _again(
        self, there: LiveExport, root: RootRecord, request: ExportRequest
    ) -> LiveExport:
        record = there.record
        same = (root.block_image, request.socket, request.owner, int(request.writable))
        if (record.block_image, record.socket, record.owner or "", record.writable) != same:
            raise Busy(
                f"export {record.name} is of another image, on another socket or not as writable",
                remedy=f"cubecache unexport {record.name}, or choose another --name",
            )
        if there.device is None:
            await self.attachments.attach(there, recording=request.record)
        elif request.record and there.start is not None:
            there.start.record(None)
        return there

    async def _root(self, image: ImageRequest) -> RootRecord:
        reference = parse_reference(image.reference)
        digest = await self.catalog.resolve_name(alias_name(reference))
        choice = FaceChoice.parse(image.face)
        key = ImageKey(digest, choice.face, choice.options)
        return await self.catalog.find_root(key)

    async def _run_config(self, root: RootRecord, raw: bytes | None) -> str:
        if raw is None:
            raw = await self.catalog.blob(root.config, root.generation)
        return run_config(root, raw)

    def start_of(self, name: str) -> ExportStart:
        """What is known of one export's start; NotFound."""
        export = self._live.get(name)
        if export is None or export.start is None:
            raise NotFound(f"no export {name!r} is served", remedy="cubecache exports")
        return export.start

    async def unexport(self, name: str, *, force: bool) -> None:
        """Ends an export; Busy while a client is attached, unless forced."""
        async with self.changing:
            self._check_here()
            export = self._live.get(name)
            if export is None:
                raise NotFound(f"no export {name!r}", remedy="cubecache exports")
            if export.clients and not force:
                raise Busy(
                    f"export {name} has {export.clients} attached clients",
                    remedy="detach them, or unexport --force",
                )
            export.closing = True
            await self.attachments.detach(export, forget=True)
            await asyncio.to_thread(self._table.drop, name)
            del self._live[name]
            self.holding.changed()
            if not any(x.record.block_image == export.record.block_image for x in self.exports()):
                self.attachments.maps.forget(export.record.block_image)
            await self.firsts.release()

    def _check_here(self) -> None:
        if self.passed_on:
            raise Unavailable("the daemon is being upgraded", remedy="ask again")

    # --- the whole ---

    def status(self) -> dict[str, Any]:
        """What the daemon is doing, for people."""
        return {
            "ready": self.ready,
            "realm": self.settings.realm,
            "store": self.settings.store_url,
            "exports": len(self._live),
            "host": socket.gethostname(),
            "started": self.started,
        }

    async def close(self) -> None:
        """Drains clients and ends everything, in the order that keeps each part's promises."""
        self.ready = False
        await self.jobs.close()
        await self.nbd.drain()
        for export in self._live.values():
            export.listener = None  # closed by the drain
            with contextlib.suppress(CubecacheError):
                await self.attachments.detach(export)
        await self.holding.close(keep=self.passed_on)
        await self.starts.loads.close()
        await self.fetcher.close()
        await self.arena.close()
        await self.objects.close()
        await self.opened.close()


def arena_settings(settings: Settings) -> ArenaSettings:
    """How the host's arena is opened."""
    return ArenaSettings(
        budget_bytes=settings.cache.budget_bytes,
        integrity=Integrity(settings.cache.integrity),
    )
