"""The collector's lease: one collection at a time, told apart by a token that rises."""

from __future__ import annotations

from contextlib import suppress

from imagecache.blockimage.holdings import LeaseRecord
from imagecache.blockimage.records import MAX_RECORD
from imagecache.catalog import Catalog
from imagecache.errors import Busy, Corrupt, NotFound
from imagecache.leases.build import LeaseLost, is_dead, new_holder
from imagecache.leases.clock import StoreClock

TTL_SECONDS = 600


class CollectorLease:
    """Held by one collection; `fence` before each batch of writes or deletes."""

    def __init__(self, catalog: Catalog, clock: StoreClock, *, holder: str | None = None) -> None:
        self._store = catalog.store
        self._key = catalog.keys.collector_lease
        self._clock = clock
        self._record = LeaseRecord("collect", holder or new_holder(), TTL_SECONDS)

    async def _there(self) -> LeaseRecord | None:
        try:
            return LeaseRecord.decode(await self._store.get(self._key, limit=MAX_RECORD))
        except (NotFound, Corrupt):
            return None

    async def acquire(self) -> None:
        """Takes the lease; Busy where another collection holds it."""
        there = await self._there()
        token = 1
        if there is not None:
            token = there.token + 1
            with suppress(NotFound):
                written = (await self._store.stat(self._key)).modified
                in_time = await self._clock.now() - written <= there.ttl_seconds
                if in_time and not is_dead(there.holder):
                    raise Busy(
                        f"{there.holder} is collecting this realm",
                        remedy="wait for it; its lease ends 10 minutes after it does",
                    )
        self._record = LeaseRecord("collect", self._record.holder, TTL_SECONDS, token=token)
        await self._store.put(self._key, self._record.encode(), only_if_absent=there is None)
        await self._require_own()

    async def _require_own(self) -> None:
        there = await self._there()
        if there is None or (there.holder, there.token) != (
            self._record.holder,
            self._record.token,
        ):
            raise LeaseLost("another collection took this realm over", remedy="collect later")

    async def fence(self) -> None:
        """LeaseLost where another collection has begun; else the lease runs anew."""
        await self._require_own()
        await self._store.put(self._key, self._record.encode())

    async def release(self) -> None:
        """Ends the lease, if it is still ours."""
        with suppress(LeaseLost):
            await self._require_own()
            await self._store.delete(self._key)
