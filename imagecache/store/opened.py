"""A store and its reader, as `open_store` hands them out."""

from __future__ import annotations

from dataclasses import dataclass

from imagecache.blockimage.seals import NO_SEALS, Seals
from imagecache.store.base import RangeReader, Store
from imagecache.store.counters import ReadCounters
from imagecache.store.stream import StreamReader

URL_FORMS = "file:///path, s3://bucket/prefix?endpoint=URL&region=NAME, memory:"


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """A store ready for use; `url` names it in messages and holds no secret.

    `seals` opens the chunks of the realm that it was opened for.
    """

    url: str
    store: Store
    reader: RangeReader
    counters: ReadCounters
    streamer: StreamReader
    seals: Seals = NO_SEALS

    async def close(self) -> None:
        """End its connections and threads."""
        await self.reader.close()
        await self.store.close()
