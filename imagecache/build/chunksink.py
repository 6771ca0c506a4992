"""Encoding chunks on threads and appending the new ones to pack files, in order of submission."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from imagecache.blockimage.extents import ChunkList
from imagecache.blockimage.locations import Location, pack_name
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.chunks.codec import DEFAULT_LEVEL, ChunkEncoder
from imagecache.packs.pack import PackWriter

THREADS = 2
IN_FLIGHT = 32
"""Chunks between submission and the pack: 8 MiB of plaintext at the most."""


@dataclass(frozen=True, slots=True)
class FinishedPack:
    """One pack file, ready to be stored under its name."""

    path: Path
    name: bytes
    length: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    digest: bytes
    blocks: int
    codec: int
    stored: bytes  # empty where the chunk was known already


class ChunkSink:
    """Takes plaintext chunks, gives digests by ticket, and writes what is new into packs.

    One thread calls it; hashing and compression run on its own threads, where both release the
    interpreter lock.
    """

    def __init__(
        self,
        directory: Path,
        known: dict[bytes, Location],
        announce: Callable[[FinishedPack], None],
        *,
        generation: int = 1,
        level: int = DEFAULT_LEVEL,
    ) -> None:
        self.digests: list[bytes] = []
        self.new_chunks = 0
        self.stored_bytes = 0
        self._directory = directory
        self._known = known
        self._announce = announce
        self._level = level
        self._generation = generation
        self._places: dict[bytes, tuple[int, int, int, int]] = {}
        self._pack_names: list[bytes] = []
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="encode")
        self._local = threading.local()
        self._pending: deque[Future[_Encoded]] = deque()
        self._writer: PackWriter | None = None
        self._file: BinaryIO | None = None

    def submit(self, plaintext: bytes) -> int:
        """Queues one chunk; its digest stands at the returned index of `digests` after `finish`."""
        if len(self._pending) >= IN_FLIGHT:
            self._drain_one()
        self._pending.append(self._pool.submit(self._encode, plaintext))
        return len(self.digests) + len(self._pending) - 1

    def _encode(self, plaintext: bytes) -> _Encoded:
        digest = chunk_digest(plaintext)
        blocks = len(plaintext) // BLOCK
        if digest in self._known or digest in self._places:
            return _Encoded(digest, blocks, 0, b"")
        encoder = getattr(self._local, "encoder", None)
        if encoder is None:
            encoder = self._local.encoder = ChunkEncoder(self._level)
        codec, stored = encoder.encode(plaintext)
        return _Encoded(digest, blocks, codec, stored)

    def _drain_one(self) -> None:
        encoded = self._pending.popleft().result()
        self.digests.append(encoded.digest)
        if encoded.digest in self._known or encoded.digest in self._places:
            return
        if self._writer is None or self._file is None:
            self._writer = PackWriter()
            self._file = (self._directory / f"pack-{len(self._pack_names):05d}").open("wb")
            self._file.write(self._writer.start())
        offset = self._writer.length
        self._file.write(
            self._writer.add(
                encoded.digest, encoded.stored, blocks=encoded.blocks, codec=encoded.codec
            )
        )
        place = (len(self._pack_names), offset, len(encoded.stored), encoded.codec)
        self._places[encoded.digest] = place
        self.new_chunks += 1
        self.stored_bytes += len(encoded.stored)
        if self._writer.is_full():
            self._close_pack()

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
        self._close_pack()
        self._pool.shutdown()

    def locations(self, chunks: ChunkList) -> list[Location]:
        """Where each chunk of a list is: in the packs just written, or where it was known to be."""
        return [self._locate(digest) for digest, _ in chunks]

    def _locate(self, digest: bytes) -> Location:
        place = self._places.get(digest)
        if place is None:
            return self._known[digest]
        pack, offset, length, codec = place
        return Location(self._pack_names[pack], offset, length, codec, 0)
