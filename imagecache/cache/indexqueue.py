"""Writing the index behind: changes wait a moment, one row per slot, and go in batches."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from imagecache.cache.index import SlotIndex

log = logging.getLogger(__name__)

_DELAY_SECONDS = 0.25
_MAX_EVIDENCE = 100


class IndexQueue:
    """Owns an index and the one thread that writes it. The loop notes; `run` carries over."""

    def __init__(self, index: SlotIndex, retry_seconds: float) -> None:
        self._index = index
        self._retry_seconds = retry_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="arena-index")
        self._changes: dict[int, tuple[bytes, int] | None] = {}
        self._evidence: list[tuple[int, bytes, str]] = []
        self._changed = asyncio.Event()

    def note(self, slot: int, row: tuple[bytes, int] | None) -> None:
        """A slot's (digest, blocks) from now on, or None for nothing."""
        self._changes[slot] = row
        self._changed.set()

    def keep_evidence(self, slot: int, digest: bytes, reason: str) -> None:
        """A chunk was quarantined; beyond a hundred waiting ones, evidence is not kept."""
        if len(self._evidence) < _MAX_EVIDENCE:
            self._evidence.append((slot, digest, reason))

    async def run(self) -> None:
        """Writes changes as they come, until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_DELAY_SECONDS)
            self._changed.clear()
            if not await self._write():
                await asyncio.sleep(self._retry_seconds)
                self._changed.set()

    async def flush(self) -> bool:
        """Writes what waits; False where the database refuses (it is kept for the next time)."""
        return await self._write()

    def forget(self) -> None:
        """Drops what waits: somebody else owns the index now."""
        self._changes, self._evidence = {}, []

    async def close(self) -> None:
        """Writes what waits, and ends connection and thread."""
        await self._write()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._index.close)
        await loop.run_in_executor(None, self._thread.shutdown)

    async def _write(self) -> bool:
        changes, self._changes = self._changes, {}
        evidence, self._evidence = self._evidence, []

        def job() -> None:
            if changes:
                self._index.apply(changes)
            for slot, digest, reason in evidence:
                self._index.quarantined(slot, digest, reason)

        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, job)
        except asyncio.CancelledError:
            # Whether the thread had begun is unknown; written twice, a row is the same row.
            self._changes = {**changes, **self._changes}
            raise
        except OSError as error:
            # The index is a hint: the cache works without, and what waits is one row per slot.
            log.warning("%s; will try again", error)
            self._changes = {**changes, **self._changes}
            return False
        return True
