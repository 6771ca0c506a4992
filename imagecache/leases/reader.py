"""Reader leases: what one daemon's exports read stays, until it stops renewing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from imagecache.blockimage.generations import State
from imagecache.blockimage.holdings import LeaseRecord
from imagecache.catalog import Catalog
from imagecache.errors import CubecacheError, Denied, NotFound
from imagecache.leases.build import new_holder

log = logging.getLogger(__name__)

TTL_SECONDS = 3600
"""Long, because a daemon that cannot renew cannot read the store either."""


@dataclass(frozen=True, slots=True)
class Held:
    """One export's claim: the image, the generation its root was found in, its packs (hex)."""

    image: str
    generation: int
    packs: tuple[str, ...]


class ReaderLease:
    """One daemon's lease over all its exports; one task renews it."""

    def __init__(
        self, catalog: Catalog, *, holder: str | None = None, ttl_seconds: int = TTL_SECONDS
    ) -> None:
        self._catalog = catalog
        self._holder = holder or new_holder()
        self._ttl_seconds = ttl_seconds
        self._held: tuple[Held, ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._may_write = True

    async def hold(self, held: Iterable[Held]) -> list[Held]:
        """Leases exactly these; those whose generation nobody may newly rely on are returned.

        What is returned has to be looked up again: its image is in a newer generation, or gone.
        Raises Unavailable; a store that may not be written is read without a lease, with a warning.
        """
        self._held = tuple(held)
        await self._write()
        if not self._held:
            return []
        states = {known.number: known.state for known in await self._catalog.generations()}
        return [
            claim
            for claim in self._held
            if states.get(claim.generation, State.DELETED) >= State.CLOSING
        ]

    async def _write(self) -> None:
        if not self._may_write:
            return
        key = self._catalog.keys.reader_lease(self._holder)
        record = LeaseRecord(
            "read",
            self._holder,
            self._ttl_seconds,
            images=tuple(sorted({claim.image for claim in self._held})),
            packs=tuple(sorted({pack for claim in self._held for pack in claim.packs})),
        )
        try:
            if self._held:
                await self._catalog.store.put(key, record.encode())
            else:
                await self._catalog.store.delete(key)
        except Denied as error:
            self._may_write = False
            log.warning(
                "the store may not be written, so collection cannot know what is exported here: "
                "pin the images (%s)",
                error,
            )

    async def renew(self) -> list[Held]:
        """Writes the lease again; as `hold`."""
        return await self.hold(self._held) if self._held else []

    def start(self, moved: Callable[[list[Held]], Awaitable[None]]) -> None:
        """Renews in the background until `close`; `moved` is given what has to be looked up."""
        self._task = asyncio.create_task(self._keep(moved), name="reader lease")

    async def _keep(self, moved: Callable[[list[Held]], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(self._ttl_seconds / 3)
            try:
                if stale := await self.renew():
                    await moved(stale)
            except CubecacheError as error:
                log.warning("reader lease not renewed: %s", error)

    async def close(self, *, keep: bool = False) -> None:
        """Ends the renewal and, unless it is to run out by itself, the lease."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._held and not keep:
            self._held = ()
            with suppress(CubecacheError, NotFound):
                await asyncio.wait_for(self._write(), 5)
