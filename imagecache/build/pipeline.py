"""The build pipeline: reference in, committed block image out."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from imagecache.blockimage.generations import State
from imagecache.blockimage.keys import FORMAT_VERSION, ImageKey, SealedKind
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest, Face
from imagecache.blockimage.records import LayerRecord, RootRecord
from imagecache.build.downloads import Download, Downloads
from imagecache.build.progress import BuildResult, Progress, Report, Stage
from imagecache.build.spool import Spool
from imagecache.build.workers import Worker
from imagecache.catalog import AliasName, Catalog
from imagecache.chunks.codec import DEFAULT_LEVEL
from imagecache.errors import Busy, Corrupt, LimitExceeded, NotFound, Rejected
from imagecache.flatten.limits import Limits
from imagecache.leases.build import BuildLease, BuildLeases, LeaseLost
from imagecache.oci.platform import Platform
from imagecache.oci.source import ImageLayer, ImageSource, ResolvedImage
from imagecache.repair.damage import quarantined_packs
from imagecache.tasks import task_group

log = logging.getLogger(__name__)

UPLOADS = 4
ATTEMPTS = 3
"""Builds of one image before giving up: each more means that a generation closed meanwhile."""
MAX_REFERENCES = 3


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Bounds of a build; none of them reaches an identity."""

    limits: Limits = field(default_factory=Limits)
    level: int = DEFAULT_LEVEL
    deadline_seconds: float = 3600.0
    worker_memory_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class _Placed:
    """A converted layer on this disk: plaintext index and location table."""

    index: Path
    locations: Path

    def pair(self) -> tuple[str, str]:
        return str(self.index), str(self.locations)


class Builder:
    """Builds images of one realm through one spool; the caller holds the builder's lock."""

    def __init__(
        self,
        catalog: Catalog,
        spool: Spool,
        settings: BuildSettings,
        leases: BuildLeases | None = None,
    ) -> None:
        self.catalog = catalog
        self.spool = spool
        self.settings = settings
        self.leases = leases or BuildLeases(catalog)

    async def build(
        self,
        source: ImageSource,
        platform: Platform,
        *,
        face: Face,
        options: str,
        alias: AliasName,
        report: Report,
        distrusted: frozenset[str] | None = None,
    ) -> BuildResult:
        """Builds and commits one image, or finds it committed.

        With `distrusted` (names of packs, in hex) it is built again in any case, and nothing of
        those packs, or of objects that cannot be read, is relied on.

        Raises the typed errors of every part; nothing half-made is visible after one.
        """
        started = time.monotonic()
        report(Progress(Stage.RESOLVE, 0, 0))
        image = await source.resolve(platform)
        resolved = time.monotonic() - started
        key = ImageKey(str(image.digest), face, options)
        for _ in range(ATTEMPTS):
            job = _Job(
                catalog=self.catalog,
                spool=self.spool,
                settings=self.settings,
                source=source,
                image=image,
                key=key,
                alias=alias,
                report=report,
                repairing=distrusted is not None,
                distrusted=distrusted or frozenset(),
            )
            try:
                root, result = await self._build_or_meet(job, platform)
            except LeaseLost as error:
                log.warning("starting over: %s", error)
                continue
            await self._point(alias, str(image.digest))
            # What is written while its generation closes may have missed the collector's look.
            if await self._settled(root):
                break
        else:
            raise Busy(
                f"{alias.text} was overtaken by collection or another builder {ATTEMPTS} times",
                remedy="preload it again",
            )
        result = result or _result_of(root, alias)
        result.stages[Stage.RESOLVE] = resolved
        result.seconds = time.monotonic() - started
        return result

    async def _build_or_meet(
        self, job: _Job, platform: Platform
    ) -> tuple[RootRecord, BuildResult | None]:
        """The root, and the result where it was built here and not found or built by another."""
        name = job.alias.text
        met = await self.leases.meet(
            job.key,
            lambda holder: log.info("%s is being built by %s", name, holder),
            anew=job.repairing,
        )
        if isinstance(met, RootRecord):
            return met, None
        job.lease, job.generation = met, met.generation
        async with met.kept():
            return await job.run(platform)

    async def _settled(self, root: RootRecord) -> bool:
        return await self.catalog.state_of(root.generation) is State.ACTIVE

    async def _point(self, alias: AliasName, image: str) -> None:
        try:
            if (await self.catalog.alias(alias)).image == image:
                return
        except (NotFound, Corrupt):
            pass
        await self.catalog.put_alias(alias, image)


def _result_of(root: RootRecord, alias: AliasName) -> BuildResult:
    return BuildResult(
        name=alias.text,
        image=root.image,
        block_image=root.block_image,
        size_bytes=root.size_bytes,
        chunks=root.chunks,
        layers=len(root.layers),
    )


@dataclass(kw_only=True, slots=True)
class _Job:
    """One image on its way; lives for one build."""

    catalog: Catalog
    spool: Spool
    settings: BuildSettings
    source: ImageSource
    image: ResolvedImage
    key: ImageKey
    alias: AliasName
    report: Report
    lease: BuildLease = field(init=False)
    generation: int = field(init=False)
    repairing: bool = False
    distrusted: frozenset[str] = frozenset()
    marked: set[str] = field(default_factory=set)
    stored_bytes: int = 0
    downloaded_bytes: int = 0
    new_chunks: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    worker: Worker = field(default_factory=Worker)
    stores: asyncio.TaskGroup = field(init=False)
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(UPLOADS))

    async def run(self, platform: Platform) -> tuple[RootRecord, BuildResult]:
        marked = await quarantined_packs(self.catalog)
        self.marked = {name.hex() for name in marked}
        self.distrusted |= self.marked
        layers = list(dict.fromkeys(self.image.layers))
        records = {layer.diff_id: await self._find(layer) for layer in layers}
        missing = [layer for layer in layers if records[layer.diff_id] is None]
        wanted = {str(layer.descriptor.digest) for layer in missing}
        await asyncio.to_thread(self.spool.prepare, wanted)
        largest = max((layer.descriptor.size for layer in missing), default=0)
        await asyncio.to_thread(self.spool.require_room, largest)
        known = await self._references()
        placed: dict[Any, _Placed] = {}
        downloads = Downloads(self.source, self.spool, self.report)
        try:
            async with task_group() as self.stores, downloads.running(missing) as coming:
                if missing:
                    await self.worker.start()
                for number, layer in enumerate(layers, 1):
                    record = records[layer.diff_id]
                    if record is None:
                        placed[layer.diff_id] = await self._convert(
                            coming[layer.diff_id],
                            number,
                            len(layers),
                            {
                                "known": [x.pair() for x in placed.values()],
                                "references": [x.pair() for x in known],
                            },
                        )
                    else:
                        placed[layer.diff_id] = await self._fetch_layer(record, number)
                root = await self._assemble(placed, known, platform)
        finally:
            self.downloaded_bytes = downloads.downloaded_bytes
            self.stages[Stage.PULL] = downloads.seconds
            await self.worker.close()
            await asyncio.to_thread(shutil.rmtree, self.spool.work, ignore_errors=True)
        with self._timed(Stage.COMMIT):
            self.report(Progress(Stage.COMMIT, 0, len(layers)))
            await self.lease.commit(root)
        self.stored_bytes += len(root.encode())
        await asyncio.to_thread(self.spool.prepare, set())
        result = _result_of(root, self.alias)
        result.new_chunks = self.new_chunks
        result.stored_bytes = self.stored_bytes
        result.new_layers = len(missing)
        result.downloaded_bytes = self.downloaded_bytes
        result.stages = self.stages
        return root, result

    async def _find(self, layer: ImageLayer) -> LayerRecord | None:
        try:
            record = await self.catalog.find_layer(str(layer.diff_id), self.generation)
            if self.repairing:
                index, table = bytes.fromhex(record.index), bytes.fromhex(record.locations)
                await self.catalog.sealed("indexes", index, self.generation)
                await self.catalog.sealed("locations", table, self.generation)
        except (NotFound, Corrupt):
            return None
        return None if self.distrusted.intersection(record.packs) else record

    @contextmanager
    def _timed(self, stage: Stage) -> Any:
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.stages[stage] = self.stages.get(stage, 0.0) + spent

    async def _convert(
        self,
        download: Download,
        number: int,
        layers: int,
        known: dict[str, list[tuple[str, str]]],
    ) -> _Placed:
        """Converts a blob while it arrives; what is stored of it counts once it is verified."""
        await download.begun.wait()
        directory = await asyncio.to_thread(self.spool.directory, f"layer-{number}")
        restarts = download.restarts
        with self._timed(Stage.FLATTEN):
            try:
                work = self._work_layer(download, directory, number, layers, known)
                packs = await self._while_it_arrives(download, work)
            except (Rejected, LimitExceeded):
                await download.done
                if download.restarts == restarts:
                    raise
            if download.restarts != restarts:
                # What was read has been replaced. Packs of it may still be on their way, so the
                # second attempt, from the verified blob, has a place of its own.
                directory = await asyncio.to_thread(self.spool.directory, f"layer-{number}-anew")
                packs = await self._work_layer(download, directory, number, layers, known)
        self.stores.create_task(self._store_layer(download, directory, packs))
        return _Placed(directory / "index", directory / "locations")

    async def _work_layer(
        self,
        download: Download,
        directory: Path,
        number: int,
        layers: int,
        known: dict[str, list[tuple[str, str]]],
    ) -> list[asyncio.Task[None]]:
        layer = download.layer
        job = {
            "kind": "layer",
            "blob": str(download.path),
            "blob_bytes": layer.descriptor.size,
            "diff_id": str(layer.diff_id),
            "directory": str(directory),
            **known,
        }
        return await self._work(
            job,
            lambda done: self.report(
                Progress(Stage.FLATTEN, number, layers, done, layer.descriptor.size)
            ),
        )

    async def _while_it_arrives(
        self, download: Download, work: Coroutine[Any, Any, list[asyncio.Task[None]]]
    ) -> list[asyncio.Task[None]]:
        """The work's result, once the download is verified too; its error ends the work."""
        restarts = download.restarts
        task = asyncio.create_task(work)
        try:
            both: set[asyncio.Future[Any]] = {task, download.done}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await download.done
                if download.restarts != restarts:
                    return []  # in vain: it may even wait for bytes that never come
            packs = await task
            await download.done
            return packs
        finally:
            if not task.done():
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _store_layer(
        self, download: Download, directory: Path, packs: list[asyncio.Task[None]]
    ) -> None:
        """Stores a converted layer beside the next one's conversion, its record last."""
        with self._timed(Stage.STORE):
            if packs:
                await asyncio.wait(packs)
                for pack in packs:
                    await pack
            index = await self._put("indexes", directory / "index")
            locations = await self._put("locations", directory / "locations")
            named = await asyncio.to_thread(_packs_named, directory / "locations")
            record = LayerRecord(str(download.layer.diff_id), index.hex(), locations.hex(), named)
            await self.catalog.put_layer(record, self.generation)
            self.stored_bytes += len(record.encode())
        await asyncio.to_thread(download.path.unlink, missing_ok=True)

    async def _put(self, kind: SealedKind, path: Path) -> bytes:
        name, stored = await self.catalog.put_sealed(
            kind, await asyncio.to_thread(path.read_bytes), self.generation
        )
        self.stored_bytes += stored
        return name

    async def _work(
        self, job: dict[str, Any], progress: Callable[[int], None]
    ) -> list[asyncio.Task[None]]:
        """Runs a worker; its packs are stored as they come, by the tasks returned."""
        settings = self.settings
        job |= {
            "limits": asdict(settings.limits),
            "level": settings.level,
            "memory_bytes": settings.worker_memory_bytes,
            "generation": self.generation,
        }
        packs: list[asyncio.Task[None]] = []
        events = self.worker.run(job, deadline_seconds=settings.deadline_seconds)
        async with aclosing(events):
            async for event in events:
                if event["event"] == "progress":
                    progress(event["bytes"])
                elif event["event"] == "pack":
                    await self.places.acquire()
                    task = self.stores.create_task(self._store_pack(event))
                    task.add_done_callback(lambda _: self.places.release())
                    packs.append(task)
                else:
                    self.new_chunks += event["new_chunks"]
        return packs

    async def _store_pack(self, event: dict[str, Any]) -> None:
        path = Path(event["path"])
        name = bytes.fromhex(event["name"])
        key = self.catalog.keys.pack(name)
        await self.catalog.store.put(key, path)
        if event["name"] in self.marked:  # what stood there was damaged, and is no more
            await self.catalog.store.delete(self.catalog.keys.quarantined(name))
        self.stored_bytes += event["length"]
        await asyncio.to_thread(path.unlink)

    async def _fetch_layer(self, record: LayerRecord, number: int) -> _Placed:
        """Brings a known layer's index and table here; its blob is not needed."""
        directory = await asyncio.to_thread(self.spool.directory, f"layer-{number}")
        return await self._fetch_pair(
            directory, "indexes", bytes.fromhex(record.index), bytes.fromhex(record.locations)
        )

    async def _fetch_pair(
        self, directory: Path, kind: SealedKind, subject: bytes, locations: bytes
    ) -> _Placed:
        placed = _Placed(directory / "index", directory / "locations")
        plaintext = await self.catalog.sealed(kind, subject, self.generation)
        await asyncio.to_thread(placed.index.write_bytes, plaintext)
        plaintext = await self.catalog.sealed("locations", locations, self.generation)
        await asyncio.to_thread(placed.locations.write_bytes, plaintext)
        return placed

    async def _references(self) -> list[_Placed]:
        """Earlier images of the same repository, whose chunks need not be stored again."""
        found: list[_Placed] = []
        try:
            names = await self.catalog.aliases(self.alias.repository)
        except Corrupt:
            return []  # a damaged name: this very build may be what mends it
        for image in dict.fromkeys(name.image for name in names):
            key = ImageKey(image, self.key.face, self.key.options)
            directory = await asyncio.to_thread(self.spool.directory, f"reference-{len(found)}")
            try:
                root = await self.catalog.root_in(key, self.generation)
                if self.distrusted.intersection(root.packs):
                    continue
                pair = await self._fetch_pair(
                    directory,
                    "manifests",
                    bytes.fromhex(root.block_image),
                    bytes.fromhex(root.locations),
                )
            except (NotFound, Corrupt):
                continue  # nothing to reuse; what is damaged is the scrub's to tell
            found.append(pair)
            if len(found) == MAX_REFERENCES:
                break
        return found

    async def _assemble(
        self, placed: dict[Any, _Placed], known: list[_Placed], platform: Platform
    ) -> RootRecord:
        directory = await asyncio.to_thread(self.spool.directory, "image")
        image = self.image
        self.report(Progress(Stage.FLATTEN, 0, len(image.layers)))
        with self._timed(Stage.FLATTEN):
            await self._work(
                {
                    "kind": "image",
                    "directory": str(directory),
                    "layers": [placed[layer.diff_id].pair() for layer in image.layers],
                    "references": [x.pair() for x in known],
                    "face": int(self.key.face),
                    "options": self.key.options,
                },
                lambda _: None,
            )
        with self._timed(Stage.STORE):
            self.report(Progress(Stage.STORE, 0, len(image.layers)))
            block_image = await self._put("manifests", directory / "manifest")
            locations = await self._put("locations", directory / "locations")
            for digest, raw in (
                (str(image.digest), image.manifest_raw),
                (str(image.manifest.config.digest), image.config_raw),
            ):
                await self.catalog.put_blob(digest, raw, self.generation)
                self.stored_bytes += len(raw)
        return await asyncio.to_thread(
            _root_record, self, platform, directory, block_image, locations
        )


def _packs_named(table: Path) -> tuple[str, ...]:
    return tuple(name.hex() for name in LocationTable.decode(table.read_bytes()).packs)


def _root_record(
    job: _Job, platform: Platform, directory: Path, block_image: bytes, locations: bytes
) -> RootRecord:
    manifest = BlockManifest.decode((directory / "manifest").read_bytes())
    table = LocationTable.decode((directory / "locations").read_bytes())
    image = job.image
    return RootRecord(
        realm=job.catalog.keys.realm,
        generation=job.generation,
        image=str(image.digest),
        face=manifest.face.name.lower(),
        options=manifest.options,
        format_version=FORMAT_VERSION,
        platform=str(platform),
        config=str(image.manifest.config.digest),
        block_image=block_image.hex(),
        locations=locations.hex(),
        layers=tuple(str(layer.diff_id) for layer in image.layers),
        packs=tuple(name.hex() for name in table.packs),
        size_bytes=manifest.size_bytes,
        chunks=len(manifest.chunks),
        packed_bytes=sum(table.stored_lengths),
    )
