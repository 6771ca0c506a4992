"""Layers of one build: converted by a worker while they arrive, or fetched where known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imagecache.blockimage.keys import SealedKind
from imagecache.blockimage.seals import PackKey
from imagecache.build.downloads import Download
from imagecache.build.output import BuildOutput
from imagecache.build.progress import Progress, Report, Stage, StageTimes
from imagecache.build.settings import BuildSettings
from imagecache.build.spool import Spool
from imagecache.build.workers import Worker
from imagecache.catalog import Catalog
from imagecache.errors import LimitExceeded, Rejected


@dataclass(frozen=True, slots=True)
class Placed:
    """A layer or image on this disk: plaintext index or manifest, and location table."""

    subject: Path
    locations: Path

    def pair(self) -> tuple[str, str]:
        """Both paths, as jobs of the worker name them."""
        return str(self.subject), str(self.locations)


async def fetch_pair(
    catalog: Catalog,
    directory: Path,
    kind: SealedKind,
    names: tuple[bytes, bytes],
    generation: int,
) -> Placed:
    """Brings an index or manifest and its location table (`names`) into a directory."""
    placed = Placed(directory / "index", directory / "locations")
    plaintext = await catalog.sealed(kind, names[0], generation)
    await asyncio.to_thread(placed.subject.write_bytes, plaintext)
    plaintext = await catalog.sealed("locations", names[1], generation)
    await asyncio.to_thread(placed.locations.write_bytes, plaintext)
    return placed


class LayerWork:
    """One build's worker process and what it is given to do."""

    def __init__(
        self,
        spool: Spool,
        settings: BuildSettings,
        output: BuildOutput,
        report: Report,
        times: StageTimes,
        *,
        generation: int,
        tasks: asyncio.TaskGroup,
        pack_key: PackKey | None = None,
    ) -> None:
        """The caller closes `worker`; stores of finished layers are `tasks`.

        The worker is given `pack_key` and no other secret.
        """
        self._pack_key = pack_key
        self.worker = Worker()
        self.new_chunks = 0
        self._spool = spool
        self._settings = settings
        self._output = output
        self._report = report
        self._times = times
        self._generation = generation
        self._tasks = tasks

    async def convert(
        self,
        download: Download,
        number: int,
        layers: int,
        known: dict[str, list[tuple[str, str]]],
    ) -> Placed:
        """Converts a blob while it arrives; what is stored of it counts once it is verified."""
        await download.begun.wait()
        directory = await asyncio.to_thread(self._spool.directory, f"layer-{number}")
        restarts = download.restarts
        with self._times.timed(Stage.FLATTEN):
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
                directory = await asyncio.to_thread(self._spool.directory, f"layer-{number}-anew")
                packs = await self._work_layer(download, directory, number, layers, known)
        self._tasks.create_task(self._store_layer(download, directory, packs))
        return Placed(directory / "index", directory / "locations")

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
        return await self.work(
            job,
            lambda done: self._report(
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
        """Stores a converted layer beside the next one's conversion."""
        with self._times.timed(Stage.STORE):
            await self._output.put_layer(str(download.layer.diff_id), directory, packs)
        await asyncio.to_thread(download.path.unlink, missing_ok=True)

    async def work(
        self, job: dict[str, Any], progress: Callable[[int], None]
    ) -> list[asyncio.Task[None]]:
        """Runs a worker; its packs are stored as they come, by the tasks returned."""
        settings = self._settings
        job |= {
            "limits": asdict(settings.limits),
            "level": settings.level,
            "threads": settings.threads,
            "memory_bytes": settings.worker_memory_bytes,
            "generation": self._generation,
            "pack_key": self._pack_key.as_json() if self._pack_key is not None else None,
        }
        packs: list[asyncio.Task[None]] = []
        events = self.worker.run(job, deadline_seconds=settings.deadline_seconds)
        async with aclosing(events):
            async for event in events:
                if event["event"] == "progress":
                    progress(event["bytes"])
                elif event["event"] == "pack":
                    packs.append(await self._output.take_pack(event))
                else:
                    self.new_chunks += event["new_chunks"]
        return packs
