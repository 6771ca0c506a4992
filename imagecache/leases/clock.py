"""The store's clock: the time at which it says a just written object was modified."""

from __future__ import annotations

from imagecache.catalog import Catalog
from imagecache.errors import NotFound, Unavailable, Unsupported

MAX_SKEW_SECONDS = 120.0


class StoreClock:
    """Tells a realm's time, in the store's seconds."""

    def __init__(self, catalog: Catalog) -> None:
        self._store = catalog.store
        self._key = catalog.keys.clock

    async def now(self) -> float:
        """The store's time, between the call and the answer."""
        for _ in range(3):
            await self._store.put(self._key, b"now")
            try:
                return (await self._store.stat(self._key)).modified
            except NotFound:
                continue  # read after write takes a moment on some stores (G6)
        raise Unavailable("the store does not show an object that it has just taken")

    async def require_agreement(self, host_seconds: float) -> float:
        """The store's time; Unsupported where the host's is more than two minutes away (H8)."""
        now = await self.now()
        if abs(now - host_seconds) > MAX_SKEW_SECONDS:
            raise Unsupported(
                f"the clocks of this host and of the store differ by {abs(now - host_seconds):.0f} "
                "seconds",
                remedy="set the host's clock; collection refuses above two minutes",
            )
        return now
