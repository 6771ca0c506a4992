"""What the store says of the realm, remembered for a while and asked for in the background.

Who watches (the page, a scrape) never waits for the store, and a store that nobody watches is asked
nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from imagecache.blockimage.generations import State
from imagecache.blockimage.holdings import LeaseRecord
from imagecache.blockimage.records import MAX_RECORD
from imagecache.catalog import Catalog
from imagecache.errors import CubecacheError, NotFound
from imagecache.imagelist import listed_images

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Collections:
    """Of the realm: collections ever begun, by whichever host, and generations by state."""

    begun: int = 0
    last_seen: float | None = None  # the store's seconds
    generations: dict[str, int] = field(default_factory=dict)


class _Remembered(Generic[T]):
    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self.value: T | None = None
        self.error: str | None = None
        self._ask = ask
        self._asked = float("-inf")
        self._task: asyncio.Task[None] | None = None

    def get(self, age_seconds: float) -> T | None:
        """What is known; asked for again where it is older."""
        running = self._task is not None and not self._task.done()
        if not running and time.monotonic() - self._asked > age_seconds:
            self._asked = time.monotonic()
            self._task = asyncio.get_running_loop().create_task(self._refresh())
        return self.value

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                self.value = await self._ask()
            self.error = None
        except (CubecacheError, TimeoutError) as error:
            self.error = str(error) or "the store does not answer"
            log.warning("the realm cannot be looked at: %s", self.error)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


class RealmView:
    """One realm as its watchers see it; `close` before the store."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._images: _Remembered[list[dict[str, Any]]] = _Remembered(
            lambda: listed_images(catalog)
        )
        self._collections: _Remembered[Collections] = _Remembered(self._ask_collections)

    def images(self, age_seconds: float) -> tuple[list[dict[str, Any]] | None, str | None]:
        """The images as last seen, None before; and why they could not be asked for lately."""
        return self._images.get(age_seconds), self._images.error

    def collections(self, age_seconds: float) -> Collections | None:
        """Collection as last seen; None before."""
        return self._collections.get(age_seconds)

    async def _ask_collections(self) -> Collections:
        counted = Counter(each.state for each in await self._catalog.generations())
        by_state = {state.word: counted[state] for state in State}
        key = self._catalog.keys.collector_lease
        try:
            lease = LeaseRecord.decode(await self._catalog.store.get(key, limit=MAX_RECORD))
            seen = (await self._catalog.store.stat(key)).modified
        except NotFound:
            return Collections(generations=by_state)
        return Collections(lease.token, seen, by_state)

    async def close(self) -> None:
        """Ends what is asked."""
        await self._images.close()
        await self._collections.close()
