"""Encoding chunks on threads and appending the new ones to pack files, in order of submission."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from imagecache.blockimage.extents import ChunkList
from imagecache.blockimage.locations import Location, pack_name
from imagecache.blockimage.seals import NO_KEY, PackKey
from imagecache.build.known import KnownChunks
from imagecache.build.reuse import LEAST_RUN_BYTES, ReuseRuns
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.chunks.codec import DEFAULT_LEVEL, ChunkEncoder
from imagecache.packs.pack import TARGET_BYTES, PackWriter

LEAST_ROOM_BYTES = 8 * TARGET_BYTES
"""Free disk below which a pack is begun only when those before it have been stored."""

_PAUSE_SECONDS = 0.2
IN_FLIGHT = 32
"""Chunks between submission and the pack: 8 MiB of plaintext at the most."""


@dataclass(frozen=True, slots=True)
class FinishedPack:
    """One pack file, ready to be stored under its name."""

    path: Path
    name: bytes
    length: int


@dataclass(frozen=True, slots=True)
class _Hashed:
    """A chunk with its digest, and its stored form where nothing was known of it."""

    digest: bytes
    plaintext: bytes
    codec: int = 0
    stored: bytes = b""  # empty where the chunk was known already


class ChunkSink:
    """Takes plaintext chunks, gives digests by ticket, and writes what is new into packs.

    One thread calls it; hashing and compression run on its own threads, where both release the
    interpreter lock.
    """

    def __init__(
        self,
        directory: Path,
        known: KnownChunks,
        announce: Callable[[FinishedPack], None],
        *,
        generation: int = 1,
        level: int = DEFAULT_LEVEL,
        least_run_bytes: int = LEAST_RUN_BYTES,
        threads: int = 0,
        pack_key: PackKey | None = None,
    ) -> None:
        """`pack_key` seals what is stored; None: packs are written in the clear.

        `threads` encode; 0: as many as there are cores.
        """
        self._pack_key = pack_key
        self._key_id = pack_key.key_id if pack_key is not None else NO_KEY
        self.digests: list[bytes] = []
        self.new_chunks = 0
        self.stored_bytes = 0
        self._directory = directory
        self._known = known
        self._runs: ReuseRuns[_Hashed] = ReuseRuns(least_run_bytes)
        self._announce = announce
        self._level = level
        self._generation = generation
        self._places: dict[bytes, tuple[int, int, int, int]] = {}
        self._pack_names: list[bytes] = []
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="encode")
        self._local = threading.local()
        self._pending: deque[Future[_Hashed]] = deque()
        self._writer: PackWriter | None = None
        self._file: BinaryIO | None = None

    def submit(self, plaintext: bytes) -> int:
        """Queues one chunk; its digest stands at the returned index of `digests` after `finish`."""
        if len(self._pending) >= IN_FLIGHT:
            self._drain_one()
        self._pending.append(self._pool.submit(self._take, plaintext))
        return len(self.digests) + len(self._pending) - 1

    def _take(self, plaintext: bytes) -> _Hashed:
        digest = chunk_digest(plaintext)
        if digest in self._known or digest in self._places:
            return _Hashed(digest, plaintext)
        return self._encode(_Hashed(digest, plaintext))

    def _encode(self, chunk: _Hashed) -> _Hashed:
        encoder = getattr(self._local, "encoder", None)
        if encoder is None:
            encoder = self._local.encoder = ChunkEncoder(self._level)
        codec, stored = encoder.encode(chunk.plaintext)
        if self._pack_key is not None:
            stored = self._pack_key.seal_chunk(chunk.digest, stored)
        return _Hashed(chunk.digest, chunk.plaintext, codec, stored)

    def _drain_one(self) -> None:
        chunk = self._pending.popleft().result()
        digest = chunk.digest
        self.digests.append(digest)
        self._runs.passed(len(chunk.plaintext))
        # What this image has elsewhere is there already when a reader comes to it again.
        if digest in self._places or digest in self._known.image or digest in self._runs:
            return
        place = self._known.references.get(digest)
        if place is not None:
            self._store_all(self._runs.add(digest, place, chunk, len(chunk.plaintext)))
            return
        self._store_all(self._runs.end())
        self._store(chunk)

    def _store_all(self, chunks: list[_Hashed]) -> None:
        """Stores known chunks of runs that are too short."""
        for chunk in self._pool.map(self._encode, chunks):
            self._store(chunk)

    def _store(self, chunk: _Hashed) -> None:
        if self._writer is None or self._file is None:
            self._wait_for_room()
            self._writer = PackWriter(self._pack_key)
            self._file = (self._directory / f"pack-{len(self._pack_names):05d}").open("wb")
            self._file.write(self._writer.start())
        offset = self._writer.length
        blocks = len(chunk.plaintext) // BLOCK
        self._file.write(
            self._writer.add(
                chunk.digest,
                chunk.stored,
                blocks=blocks,
                codec=chunk.codec,
                key_id=self._key_id,
            )
        )
        place = (len(self._pack_names), offset, len(chunk.stored), chunk.codec)
        self._places[chunk.digest] = place
        self.new_chunks += 1
        self.stored_bytes += len(chunk.stored)
        if self._writer.is_full():
            self._close_pack()

    def _wait_for_room(self) -> None:
        """Lets uploads free the disk where it is nearly full; the job's deadline bounds the wait.

        Where none is waiting, the disk's end is the next write's own error.
        """
        beside = self._directory.parent
        while shutil.disk_usage(beside).free < LEAST_ROOM_BYTES and any(beside.glob("*/pack-*")):
            time.sleep(_PAUSE_SECONDS)

    def _close_pack(self) -> None:
        if self._writer is None or self._file is None:
            return
        tail, digest = self._writer.finish()
        name = pack_name(digest, self._generation)
        self._file.write(tail)
        path = Path(self._file.name)
        self._file.close()
        self._pack_names.append(name)
        self._announce(FinishedPack(path, name, self._writer.length))
        self._writer = self._file = None

    def finish(self) -> None:
        """Writes what is pending and closes the last pack."""
        while self._pending:
            self._drain_one()
        self._store_all(self._runs.end())
        self._close_pack()
        self._pool.shutdown()

    def locations(self, chunks: ChunkList) -> list[Location]:
        """Where each chunk of a list is: in the packs just written, or where it was known to be."""
        return [self._locate(digest) for digest, _ in chunks]

    def _locate(self, digest: bytes) -> Location:
        place = self._places.get(digest)
        if place is not None:
            pack, offset, length, codec = place
            return Location(self._pack_names[pack], offset, length, codec, self._key_id)
        return self._known.image.get(digest) or self._runs.reused[digest]
