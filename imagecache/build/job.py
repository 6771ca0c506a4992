"""One image on its way: its layers, its metadata region, its commit."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from imagecache.blockimage.keys import FORMAT_VERSION, ImageKey
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.blockimage.records import LayerRecord, RootRecord
from imagecache.build.downloads import Downloads
from imagecache.build.layers import LayerWork, Placed, fetch_pair
from imagecache.build.output import BuildOutput
from imagecache.build.progress import BuildResult, Progress, Report, Stage, StageTimes
from imagecache.build.references import References
from imagecache.build.settings import BuildSettings
from imagecache.build.spool import Spool
from imagecache.build.spooled import SpooledImage, SpoolServing
from imagecache.catalog import AliasName, Catalog
from imagecache.errors import Corrupt, NotFound
from imagecache.leases.build import BuildLease
from imagecache.oci.platform import Platform
from imagecache.oci.source import ImageLayer, ImageSource, ResolvedImage
from imagecache.repair.damage import quarantined_packs
from imagecache.tasks import task_group


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOrder:
    """What is asked of a build besides the image; none of it reaches an identity.

    With `distrusted` (names of packs, in hex) it is built again in any case, and nothing of those
    packs, or of objects that cannot be read, is relied on. Chunks of `references` are not stored
    again. What `serving` raises ends the build.
    """

    alias: AliasName
    report: Report
    distrusted: frozenset[str] | None = None
    references: tuple[AliasName, ...] = ()
    serving: SpoolServing | None = None


def result_of(root: RootRecord, alias: AliasName) -> BuildResult:
    """The result of a build that found the image committed."""
    return BuildResult(
        name=alias.text,
        image=root.image,
        block_image=root.block_image,
        size_bytes=root.size_bytes,
        chunks=root.chunks,
        layers=len(root.layers),
    )


@dataclass(kw_only=True, slots=True)
class BuildJob:
    """One image on its way; lives for one build."""

    catalog: Catalog
    spool: Spool
    settings: BuildSettings
    source: ImageSource
    image: ResolvedImage
    key: ImageKey
    order: BuildOrder
    lease: BuildLease = field(init=False)
    distrusted: frozenset[str] = frozenset()
    times: StageTimes = field(default_factory=StageTimes)

    @property
    def repairing(self) -> bool:
        """Whether it is built although it is there."""
        return self.order.distrusted is not None

    @property
    def generation(self) -> int:
        """The generation that everything is written into."""
        return self.lease.generation

    async def run(self, platform: Platform) -> tuple[RootRecord, BuildResult]:
        """Builds and commits; the caller keeps `lease` meanwhile."""
        marked = frozenset(name.hex() for name in await quarantined_packs(self.catalog))
        self.distrusted = marked | (self.order.distrusted or frozenset())
        report = self.order.report
        layers = list(dict.fromkeys(self.image.layers))
        records = {layer.diff_id: await self._find(layer) for layer in layers}
        missing = [layer for layer in layers if records[layer.diff_id] is None]
        wanted = {str(layer.descriptor.digest) for layer in missing}
        await asyncio.to_thread(self.spool.prepare, wanted)
        largest = max((layer.descriptor.size for layer in missing), default=0)
        await asyncio.to_thread(self.spool.require_room, largest)
        references = await References(
            self.catalog, self.spool, self.generation, self.distrusted
        ).find(self.key, self.order.alias.repository, self.order.references)
        placed: dict[Any, Placed] = {}
        downloads = Downloads(self.source, self.spool, report)
        try:
            async with task_group() as tasks, downloads.running(missing) as coming:
                serving = self.order.serving
                output = BuildOutput(
                    self.catalog, self.generation, marked, tasks, serving.packs if serving else None
                )
                work = LayerWork(
                    self.spool,
                    self.settings,
                    output,
                    report,
                    self.times,
                    generation=self.generation,
                    tasks=tasks,
                    pack_key=self.catalog.seals.pack_key,
                )
                try:
                    if missing:
                        await work.worker.start()
                    for number, layer in enumerate(layers, 1):
                        record = records[layer.diff_id]
                        if record is None:
                            known = {
                                "known": [x.pair() for x in placed.values()],
                                "references": [x.pair() for x in references],
                            }
                            download = coming[layer.diff_id]
                            found = await work.convert(download, number, len(layers), known)
                        else:
                            found = await self._fetch_layer(record, number)
                        placed[layer.diff_id] = found
                    root = await self._assemble(work, output, placed, references, platform)
                finally:
                    await work.worker.close()
        finally:
            await asyncio.to_thread(shutil.rmtree, self.spool.work, ignore_errors=True)
        with self.times.timed(Stage.COMMIT):
            report(Progress(Stage.COMMIT, 0, len(layers)))
            await self.lease.commit(root)
        await asyncio.to_thread(self.spool.prepare, set())
        result = result_of(root, self.order.alias)
        result.new_chunks = work.new_chunks
        result.stored_bytes = output.stored_bytes + len(root.encode())
        result.new_layers = len(missing)
        result.downloaded_bytes = downloads.downloaded_bytes
        result.stages = {**self.times.seconds, Stage.PULL: downloads.seconds}
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

    async def _fetch_layer(self, record: LayerRecord, number: int) -> Placed:
        """Brings a known layer's index and table here; its blob is not needed."""
        directory = await asyncio.to_thread(self.spool.directory, f"layer-{number}")
        names = bytes.fromhex(record.index), bytes.fromhex(record.locations)
        return await fetch_pair(self.catalog, directory, "indexes", names, self.generation)

    async def _assemble(
        self,
        work: LayerWork,
        output: BuildOutput,
        placed: Mapping[Any, Placed],
        references: list[Placed],
        platform: Platform,
    ) -> RootRecord:
        directory = await asyncio.to_thread(self.spool.directory, "image")
        image = self.image
        layers = [placed[layer.diff_id] for layer in image.layers]
        self.order.report(Progress(Stage.FLATTEN, 0, len(layers)))
        with self.times.timed(Stage.FLATTEN):
            await work.work(
                {
                    "kind": "image",
                    "directory": str(directory),
                    "layers": [layer.pair() for layer in layers],
                    "references": [x.pair() for x in references],
                    "face": int(self.key.face),
                    "options": self.key.options,
                },
                lambda _: None,
            )
        root = await asyncio.to_thread(_root_record, self, platform, directory)
        if self.order.serving is not None:
            files = [directory / "manifest", directory / "locations", *(x.subject for x in layers)]
            spooled = SpooledImage(root, image.config_raw, tuple(dict.fromkeys(files)))
            await self.order.serving.on_readable(spooled)
        with self.times.timed(Stage.STORE):
            self.order.report(Progress(Stage.STORE, 0, len(layers)))
            await output.put_sealed("manifests", directory / "manifest")
            await output.put_sealed("locations", directory / "locations")
            await output.put_blob(str(image.digest), image.manifest_raw)
            await output.put_blob(str(image.manifest.config.digest), image.config_raw)
        return root


def _root_record(job: BuildJob, platform: Platform, directory: Path) -> RootRecord:
    manifest_raw = (directory / "manifest").read_bytes()
    table_raw = (directory / "locations").read_bytes()
    manifest, table = BlockManifest.decode(manifest_raw), LocationTable.decode(table_raw)
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
        block_image=blake3(manifest_raw).hexdigest(),
        locations=blake3(table_raw).hexdigest(),
        layers=tuple(str(layer.diff_id) for layer in image.layers),
        packs=tuple(name.hex() for name in table.packs),
        size_bytes=manifest.size_bytes,
        chunks=len(manifest.chunks),
        packed_bytes=sum(table.stored_lengths),
    )
