"""Reading a block image's disk from a store, chunk by verified chunk, without an arena."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from imagecache.cache.decode import Wanted, decode_all
from imagecache.cache.image import HOLE, ImageMap
from imagecache.errors import Corrupt
from imagecache.store.base import Priority, RangeReader

_KEPT_BYTES = 64 << 20


class ChunkReader:
    """Keeps the chunks it used last; a chunk that is being read is not read twice."""

    def __init__(self, image: ImageMap, reader: RangeReader) -> None:
        self._image = image
        self._reader = reader
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._kept_bytes = 0
        self._coming: dict[int, asyncio.Task[bytes]] = {}

    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk; raises what the store raises, or Corrupt."""
        pieces = []
        for start, end, index in self._image.pieces(offset, offset + length):
            if index == HOLE:
                pieces.append(bytes(end - start))
                continue
            plaintext = await self._chunk(self._image.ordinals[index])
            at = start + self._image.deltas[index]
            pieces.append(plaintext[at : at + end - start])
        return b"".join(pieces)

    async def _chunk(self, ordinal: int) -> bytes:
        kept = self._kept.get(ordinal)
        if kept is not None:
            self._kept.move_to_end(ordinal)
            return kept
        task = self._coming.get(ordinal)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._fetch(ordinal))
            self._coming[ordinal] = task
            task.add_done_callback(lambda _: self._coming.pop(ordinal, None))
        return await asyncio.shield(task)

    async def _fetch(self, ordinal: int) -> bytes:
        image = self._image
        place = image.location(ordinal)
        body = await self._reader.read(
            image.pack_key(place.pack), place.offset, place.stored_length, priority=Priority.FILL
        )
        wanted = Wanted(place, image.length(ordinal), image.digest(ordinal), image.seals)
        (plaintext,) = await asyncio.to_thread(decode_all, body, place.offset, (wanted,))
        if isinstance(plaintext, Corrupt):
            raise plaintext
        self._kept[ordinal] = plaintext
        self._kept_bytes += len(plaintext)
        while self._kept_bytes > _KEPT_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= len(dropped)
        return plaintext
