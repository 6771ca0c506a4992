"""Reading an image back: every chunk fetched, decoded and held against its digest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.catalog import Catalog
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.chunks.codec import decode_chunk
from imagecache.errors import Corrupt, NotFound
from imagecache.store.base import Priority, RangeReader
from imagecache.tasks import task_group

RUN_BYTES = 4 << 20
"""Neighbouring chunks are read in one range of at most this many bytes."""

READS = 4


@dataclass(slots=True)
class VerifyReport:
    """What was read, in chunks and stored bytes, and what was wrong."""

    chunks: int = 0
    stored_bytes: int = 0
    damaged: list[str] = field(default_factory=list)  # chunk digests in hex


class Verifier:
    """Reads one block image back; used once."""

    def __init__(
        self,
        catalog: Catalog,
        reader: RangeReader,
        manifest: BlockManifest,
        locations: LocationTable,
    ) -> None:
        self.report = VerifyReport()
        self._catalog = catalog
        self._reader = reader
        self._manifest = manifest
        self._locations = locations

    async def run(self, progress: Callable[[int], None]) -> VerifyReport:
        """Reads every chunk; damaged or missing ones are in the report.

        Raises Unavailable or Denied when the store could not be asked.
        """
        places = asyncio.Semaphore(READS)

        async def check(ordinals: list[int]) -> None:
            try:
                await self._check(ordinals)
            finally:
                places.release()
            progress(self.report.stored_bytes)

        async with task_group() as group:
            for ordinals in contiguous_runs(self._locations):
                await places.acquire()
                group.create_task(check(ordinals))
        return self.report

    async def _check(self, ordinals: list[int]) -> None:
        first = self._locations.locate(ordinals[0])
        total = sum(self._locations.stored_lengths[ordinal] for ordinal in ordinals)
        key = self._catalog.keys.pack(first.pack)
        try:
            raw = await self._reader.read(key, first.offset, total, priority=Priority.FILL)
        except NotFound:
            chunks = self._manifest.chunks
            self.report.damaged.extend(chunks.digest(ordinal).hex() for ordinal in ordinals)
            return
        self.report.damaged.extend(await asyncio.to_thread(self._damaged, ordinals, raw))
        self.report.chunks += len(ordinals)
        self.report.stored_bytes += total

    def _damaged(self, ordinals: list[int], raw: bytes) -> list[str]:
        view, at, damaged = memoryview(raw), 0, []
        for ordinal in ordinals:
            place = self._locations.locate(ordinal)
            stored = view[at : at + place.stored_length]
            at += place.stored_length
            digest = self._manifest.chunks.digest(ordinal)
            length = self._manifest.chunks.sizes[ordinal] * BLOCK
            try:
                opened = self._catalog.seals.open_chunk(place.key_id, digest, stored)
                intact = chunk_digest(decode_chunk(place.codec, opened, length)) == digest
            except Corrupt:
                intact = False
            if not intact:
                damaged.append(digest.hex())
        return damaged


def contiguous_runs(locations: LocationTable) -> list[list[int]]:
    """Ordinals grouped so that each group is one contiguous range of one pack."""
    order = sorted(
        range(len(locations)), key=lambda n: (locations.pack_ordinals[n], locations.offsets[n])
    )
    runs: list[list[int]] = []
    end, size, pack = -1, 0, -1
    for ordinal in order:
        offset, length = locations.offsets[ordinal], locations.stored_lengths[ordinal]
        follows = locations.pack_ordinals[ordinal] == pack and offset == end
        if not follows or size + length > RUN_BYTES:
            runs.append([])
            size, pack = 0, locations.pack_ordinals[ordinal]
        runs[-1].append(ordinal)
        end, size = offset + length, size + length
    return runs
