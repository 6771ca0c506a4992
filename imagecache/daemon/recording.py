"""The starts of a daemon's exports: what is brought ahead of each, its log, and its recording."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from imagecache.cache.arena import Arena
from imagecache.cache.device import BlockImageDevice
from imagecache.cache.fetch import Fetcher
from imagecache.cache.fill import Fill, FillMode
from imagecache.cache.image import ImageMap
from imagecache.cache.objects import ObjectCache
from imagecache.cache.stream import BootStream, StreamOutcome
from imagecache.catalog import Catalog
from imagecache.composition import alias_name
from imagecache.daemon.exporttable import ExportRecord
from imagecache.daemon.loading import SharedLoads
from imagecache.errors import Busy, CubecacheError, Unavailable
from imagecache.explain.report import Ahead, StartFacts, build_report
from imagecache.logcontext import about
from imagecache.oci.reference import parse_reference
from imagecache.profile.calm import CalmRule
from imagecache.profile.fileruns import file_runs
from imagecache.profile.mapping import ordinals_of, profile_of
from imagecache.profile.merge import merge_profiles
from imagecache.profile.predict.predictor import Program
from imagecache.profile.prepare import (
    ImageNames,
    LoadedImage,
    StartBuilder,
    carried,
)
from imagecache.profile.recorder import StartLog
from imagecache.profile.starts import KnownStart, Starts
from imagecache.store.base import Priority
from imagecache.store.open import OpenedStore

log = logging.getLogger(__name__)

_FIND_SECONDS = 10.0
_POLL_SECONDS = 0.5
_SOON_BYTES = 256 << 20
"""A whole image of this size is here before a host has followed its imports: measured, importing
numpy from 70 MB at 100 MB/s is ready 0.5 s later with a prediction made meanwhile than without. A
prediction made by the preload is free, and is what images usually have."""


@dataclass(slots=True)
class _Brought:
    """What was brought ahead of one start, and by what right."""

    source: str = "nothing"  # profile, carried profile, prediction
    sources: int = 0  # recordings behind it
    streamed: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)  # by ranged reads
    outcome: StreamOutcome | None = None
    error: str | None = None


class StartKeeper:
    """What all exports' starts share. `begin` one per export; close each before the fetcher."""

    def __init__(
        self,
        catalog: Catalog,
        objects: ObjectCache,
        opened: OpenedStore,
        arena: Arena,
        fetcher: Fetcher,
        *,
        scratch: Path,
    ) -> None:
        self.catalog = catalog
        self.arena = arena
        self.fetcher = fetcher
        self.opened = opened
        self._objects = objects
        self.starts = Starts(catalog, self.sealed)
        self.loads = SharedLoads(catalog, self.sealed)
        self.builder = StartBuilder(
            catalog, self.starts, opened.reader, scratch=scratch, local=arena.copy
        )

    async def sealed(self, key: str, name: bytes, limit: int) -> bytes:
        """A sealed object's plaintext, from this host where it is here."""
        return await self._objects.get(key, name, limit=limit)

    def look_up(self, reference: str, names: ImageNames) -> asyncio.Task[KnownStart | None]:
        """Asks the store what is known of a start; the caller hands the task to `begin`."""
        job = self.starts.find(repository_of(reference), names.image, likely=names.generation)
        task = asyncio.get_running_loop().create_task(job)
        # A failure is told where the answer is used; without anybody to use it, nobody misses it.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def begin(
        self,
        record: ExportRecord,
        image: ImageMap,
        fill: Fill,
        *,
        known: asyncio.Task[KnownStart | None] | None = None,
        recording: bool = False,
    ) -> ExportStart:
        """One export's start, from now on; its log is the device's recorder."""
        start = ExportStart(
            self, record, image, fill, known or self.look_up(record.reference, record)
        )
        if recording:
            start.record(None)
        start.start()
        return start


class ExportStart:
    """One export's start. Its tasks end by `close` at the latest."""

    def __init__(
        self,
        keeper: StartKeeper,
        record: ExportRecord,
        image: ImageMap,
        fill: Fill,
        known: asyncio.Task[KnownStart | None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.log = StartLog(loop.time)
        self.device: BlockImageDevice | None = None
        self.recording = "off"  # on, saving, saved, failed
        self.recording_error: str | None = None
        self.repository = repository_of(record.reference)
        self._known = known
        self._keeper = keeper
        self._record = record
        self._image = image
        self._fill = fill
        self._program = program_of_record(record)
        self._brought = _Brought()
        self._begun_at = time.time()
        self._fetched_before = self._fetched()
        self._fetched_in_start: tuple[int, int] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._saved: asyncio.Event | None = None

    # --- life

    def watch_device(self, device: BlockImageDevice) -> None:
        """The device whose reads are this start's."""
        self.device = device
        device.recorder = self.log
        if device.ahead is not None:
            device.ahead.want_files = lambda: self._spawn(self._learn_files())

    async def _learn_files(self) -> None:
        """Tells read-ahead where files begin and end."""
        try:
            loaded = await self._loaded()
            self._image.files = await asyncio.to_thread(file_runs, loaded.view)
        except CubecacheError as error:
            log.info("export %s is read ahead without files: %s", self._record.name, error)

    def start(self) -> None:
        """Begins to bring what the start will read, then to fill, and watches for its end."""
        self._spawn(self._bring())
        self._spawn(self._watch(self.log))

    async def close(self) -> None:
        """Ends the tasks; a recording that is not over is lost."""
        self._known.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, job: Any) -> None:
        with about(export=self._record.name, owner=self._record.owner or ""):
            task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- ahead of the guest

    async def _bring(self) -> None:
        try:
            if self._fill.progress.mode is not FillMode.NONE:
                await self._bring_known()
        except (CubecacheError, TimeoutError) as error:
            self._brought.error = str(error) or "the store did not answer in time"
            log.warning("start of %s: %s", self._record.name, self._brought.error)
        except Exception as error:
            self._brought.error = f"internal error: {error!r}"
            log.exception("the start of %s cannot be brought", self._record.name)
        finally:
            # Filling never depends on what is known of a start.
            self._fill.start()

    async def _bring_known(self) -> None:
        record = self._record
        async with asyncio.timeout(_FIND_SECONDS):
            known = await self._known
        if known is None:
            self._fill.start()
            whole = self._fill.progress.mode is FillMode.WHOLE
            if not whole or self._image.stored_bytes > _SOON_BYTES:
                await self._bring_predicted()
            return
        same = known.own and known.record.block_image == record.block_image
        self._brought.source = "profile" if same else "carried profile"
        self._brought.sources = known.record.sources
        if same and not known.record.sources:
            self._brought.source = "prediction"
        jobs = [self._stream(known)]
        if not same or known.boot is None:
            jobs.append(self._ask_carried(known))
        await asyncio.gather(*jobs)

    async def _stream(self, known: KnownStart) -> None:
        table = known.boot
        if table is None:
            return
        image = self._image
        wanted = {entry.digest for entry in table.entries}
        ordinal_of = await asyncio.to_thread(
            lambda: {d: n for n, d in enumerate(image.digests()) if d in wanted}
        )
        chunks = [
            (ordinal_of[entry.digest], entry)
            for entry in table.entries
            if entry.digest in ordinal_of
        ]
        self._brought.streamed = [ordinal for ordinal, _ in chunks]
        if not chunks:
            return
        stream = BootStream(
            self._keeper.fetcher,
            self._keeper.opened.streamer,
            image,
            key=self._keeper.catalog.keys.boot_pack(table.pack, known.generation),
            pack=table.pack,
            chunks=chunks,
        )
        self._brought.outcome = await stream.run()

    async def _ask_carried(self, known: KnownStart) -> None:
        """Asks for what a carried profile names and the old boot pack has not."""
        loaded = await self._loaded()
        profile = await asyncio.to_thread(carried, known, loaded)
        ordinals = await asyncio.to_thread(ordinals_of, loaded.view, profile, loaded.stored_lengths)
        packed = {entry.digest for entry in known.boot.entries} if known.boot else set()
        await self._ask([n for n in ordinals if self._image.digest(n) not in packed])

    async def _bring_predicted(self) -> None:
        found = await self._keeper.loads.prediction(self._record, self._predicted_here)
        self._brought.source = "prediction"
        await self._ask(found)

    async def _predicted_here(self) -> tuple[int, ...]:
        loaded = await self._loaded()
        builder = self._keeper.builder
        loop = asyncio.get_running_loop()

        async def read(offset: int, length: int) -> bytes:
            job = asyncio.run_coroutine_threadsafe(self._read_disk(offset, length), loop)
            return await asyncio.wrap_future(job)

        # Its own loop on a thread: following imports is seconds of work, and clients wait here.
        profile = await asyncio.to_thread(
            lambda: asyncio.run(builder.predict(loaded, self._program, read))
        )
        return tuple(
            await asyncio.to_thread(ordinals_of, loaded.view, profile, loaded.stored_lengths)
        )

    async def _ask(self, ordinals: Sequence[int]) -> None:
        self._brought.asked = list(ordinals)
        await self._keeper.fetcher.prefetch(self._image, ordinals)

    async def _loaded(self) -> LoadedImage:
        return await self._keeper.loads.image(self._record)

    async def _read_disk(self, offset: int, length: int) -> bytes:
        """Verified bytes of the disk through the arena: what is read here is here afterwards."""
        keeper, image = self._keeper, self._image
        pieces = []
        for at, stop, index in image.pieces(offset, offset + length):
            if index < 0:
                pieces.append(bytes(stop - at))
                continue
            ordinal = image.ordinals[index]
            digest = image.digest(ordinal)
            plaintext = await keeper.arena.copy(digest)
            if plaintext is None:
                wanted = keeper.fetcher.request(image, (ordinal,), Priority.PREFETCH)
                if not wanted:
                    raise Unavailable("too much is asked for ahead already")
                flight = wanted[0][0]
                await keeper.fetcher.wait((flight,))
                if flight.plaintext is None:
                    raise flight.error or Unavailable(f"chunk {digest.hex()} did not come")
                plaintext = flight.plaintext
            start = at + image.deltas[index]
            pieces.append(plaintext[start : start + stop - at])
        return b"".join(pieces)

    # --- recording

    def record(self, seconds: float | None) -> None:
        """Records this start, or what comes from now on where it is over; Busy while it does.

        `seconds` bound it; without, it ends when reads calm down.
        """
        if self.recording in ("on", "saving"):
            raise Busy(
                f"export {self._record.name} is being recorded",
                remedy="cubecache profile record --stop EXPORT",
            )
        if self.log.ended is not None or seconds is not None:
            rule = CalmRule() if seconds is None else CalmRule(limit=seconds)
            self.log = StartLog(asyncio.get_running_loop().time, rule)
            self._begun_at = time.time()
            self._fetched_before, self._fetched_in_start = self._fetched(), None
            if self.device is not None:
                self.device.recorder = self.log
            self._spawn(self._watch(self.log))
        self.recording, self.recording_error = "on", None
        self._saved = asyncio.Event()

    async def stop_recording(self) -> dict[str, Any]:
        """Ends a recording now; its profile and boot pack are stored when this returns."""
        if self.recording == "on":
            self.log.end()
        if self._saved is not None:
            await self._saved.wait()
        return self.summary()

    async def _watch(self, watched: StartLog) -> None:
        """Ends the start when it is over, and stores the recording where there is one."""
        loop = asyncio.get_running_loop()
        while watched.ended is None:
            ends_at = watched.ends_at()
            if ends_at is not None and loop.time() >= ends_at:
                watched.end()
                break
            await asyncio.sleep(_POLL_SECONDS)
        if watched is not self.log:
            return
        before, now = self._fetched_before, self._fetched()
        self._fetched_in_start = now[0] - before[0], now[1] - before[1]
        if self.recording != "on":
            return
        self.recording = "saving"
        try:
            await self._save(watched)
            self.recording = "saved"
        except CubecacheError as error:
            self.recording, self.recording_error = "failed", str(error)
            log.warning("the recording of %s is not stored: %s", self._record.name, error)
        except Exception as error:
            self.recording, self.recording_error = "failed", f"internal error: {error!r}"
            log.exception("the recording of %s is not stored", self._record.name)
        finally:
            if self._saved is not None:
                self._saved.set()

    async def _save(self, watched: StartLog) -> None:
        keeper, record = self._keeper, self._record
        loaded = await self._loaded()
        profile = await asyncio.to_thread(
            profile_of, loaded.view, record.image, loaded.block_image, watched.first_reads()
        )
        if not profile.touches and not profile.metadata:
            raise Unavailable("nothing was read while it was recorded")
        known = await keeper.starts.find(self.repository, record.image)
        # A prediction has served its time once a start was seen.
        mergeable = known is not None and known.own and known.profile.sources
        if mergeable and known is not None and known.record.block_image == record.block_image:
            profile = await asyncio.to_thread(merge_profiles, [known.profile, profile])
        await keeper.builder.build(self.repository, loaded, profile)

    # --- telling

    def _fetched(self) -> tuple[int, int]:
        classes = self._keeper.fetcher.counters.by_class
        return sum(x.bytes_fetched for x in classes), sum(x.gets for x in classes)

    def summary(self) -> dict[str, Any]:
        """What an export's JSON says of its start."""
        brought = self._brought
        outcome = brought.outcome
        return {
            "source": brought.source,
            "sources": brought.sources,
            "streamed": None if outcome is None else asdict(outcome),
            "asked_chunks": len(brought.asked),
            "error": brought.error,
            "over": self.log.ended is not None,
            "reads": self.log.reads_total,
            "recording": self.recording,
            "recording_error": self.recording_error,
        }

    async def explain(self) -> dict[str, Any]:
        """Why the start took as long as it did: `imagecache.explain.report`."""
        loaded = await self._loaded()
        known: KnownStart | None = None
        with contextlib.suppress(CubecacheError):
            known = await self._keeper.starts.find(self.repository, self._record.image)
        fetched = self._fetched_in_start
        if fetched is None:
            now, before = self._fetched(), self._fetched_before
            fetched = now[0] - before[0], now[1] - before[1]
        brought = self._brought
        facts = StartFacts(
            export=self._record.name,
            reference=self._record.reference,
            begun=self._begun_at,
            fetched_bytes=fetched[0],
            gets=fetched[1],
            get_seconds=self._keeper.fetcher.demand_seconds,
            ahead=Ahead(
                source=brought.source,
                sources=brought.sources,
                streamed=tuple(brought.streamed),
                asked=tuple(brought.asked),
                outcome=brought.outcome,
                error=brought.error,
            ),
        )
        profile = None if known is None else await asyncio.to_thread(carried, known, loaded)
        return await asyncio.to_thread(build_report, facts, self.log, loaded, profile)


def repository_of(reference: str) -> str:
    """The part of a reference whose images count as versions of each other."""
    return alias_name(parse_reference(reference)).repository


def program_of_record(record: ExportRecord) -> Program:
    """What an export's image runs, from the run configuration that is kept with the export."""
    config = json.loads(record.config)
    return Program(
        arguments=(*config["entrypoint"], *config["cmd"]),
        environment=tuple(config["env"]),
        working_directory=config["working_dir"],
    )
