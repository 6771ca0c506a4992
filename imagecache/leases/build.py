"""Build leases: builders of one image meet, and the late one uses the first one's work.

One object per image key names the holder and the generation that it writes into, which stays
active meanwhile. A lease whose object is older than its time is taken over; its holder finds out
at the commit at the latest, and starts over.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from imagecache.blockimage.generations import State
from imagecache.blockimage.holdings import LeaseRecord
from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.records import MAX_RECORD, RootRecord
from imagecache.catalog import Catalog
from imagecache.errors import Busy, Corrupt, CubecacheError, NotFound
from imagecache.leases.clock import StoreClock

log = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]


class LeaseLost(Busy):
    """Somebody else holds the lease by now, or its generation is closed: start over."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Seconds: how long a lease holds unrenewed, how often a waiting builder looks, and how long

    two builders that took over at once wait to see whose word stayed.
    """

    ttl: int = 600
    poll: float = 2.0
    settle: float = 1.0


def new_holder() -> str:
    """A name for this process as a holder, that no other has; it can stand in a key."""
    return f"h.{_host()}.{os.getpid()}.{secrets.token_hex(8)}"


@functools.cache
def _host() -> str:
    """This host since its start, and this name-space of process ids."""
    host = "".join(x if x.isascii() and x.isalnum() else "-" for x in socket.gethostname())
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        known = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        known = secrets.token_hex(8)  # then nobody here is ever taken for dead
    return f"{host[:60]}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"


def is_dead(holder: str) -> bool:
    """Whether a holder is a process of this host that has ended; its lease need not run out."""
    parts = holder.split(".")
    if len(parts) < 4 or parts[1] != _host() or not parts[2].isdecimal():
        return False
    try:
        os.kill(int(parts[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    # Killed, and not waited for yet by whoever started it: in a container, perhaps never.
    try:
        state = Path(f"/proc/{parts[2]}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in (b"Z", b"X")


class BuildLease:
    """One builder's hold on one image key."""

    def __init__(
        self, catalog: Catalog, clock: StoreClock, key: ImageKey, record: LeaseRecord
    ) -> None:
        self.record = record
        self._catalog = catalog
        self._clock = clock
        self._image = key
        self._key = catalog.keys.build_lease(key)

    @property
    def generation(self) -> int:
        """The generation that everything of this build goes into."""
        return self.record.generation

    async def _require_own(self) -> None:
        try:
            there = LeaseRecord.decode(await self._catalog.store.get(self._key, limit=MAX_RECORD))
        except (NotFound, Corrupt):
            there = None
        if there is None or there.holder != self.record.holder:
            raise LeaseLost("another builder took this image over", remedy="it is built there")

    async def renew(self) -> None:
        """Writes the lease again; LeaseLost."""
        await self._require_own()
        await self._catalog.store.put(self._key, self.record.encode())

    async def confirm(self) -> None:
        """LeaseLost unless a commit may follow: own, in time by the store's clock, still active."""
        await self._require_own()
        try:
            written = (await self._catalog.store.stat(self._key)).modified
        except NotFound:
            raise LeaseLost("the build's lease is gone") from None
        if await self._clock.now() - written > self.record.ttl_seconds:
            raise LeaseLost("the build's lease ran out before its end")
        if await self._catalog.state_of(self.generation) is not State.ACTIVE:
            raise LeaseLost(f"generation {self.generation} was closed during the build")

    async def commit(self, root: RootRecord) -> None:
        """The commit: the root record, after `confirm`."""
        await self.confirm()
        await self._catalog.commit(self._image, root)

    async def release(self) -> None:
        """Ends the hold, if it is still ours."""
        with suppress(LeaseLost):
            await self._require_own()
            await self._catalog.store.delete(self._key)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Renews in the background while the body runs, and releases after it."""
        task = asyncio.create_task(self._keep(), name="build lease")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            # A lease that cannot be given back now runs out by itself.
            with suppress(CubecacheError):
                await self.release()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self.record.ttl_seconds / 3)
            try:
                await self.renew()
            except LeaseLost as error:
                log.warning("build lease: %s", error)
                return
            except CubecacheError as error:
                log.warning("build lease not renewed: %s", error)


class BuildLeases:
    """Claims build leases for one holder."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        holder: str | None = None,
        times: LeaseTimes | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._catalog = catalog
        self._clock = StoreClock(catalog)
        self._holder = holder or new_holder()
        self._times = times or LeaseTimes()
        self._sleep = sleep
        self._warned = False

    async def meet(
        self,
        key: ImageKey,
        waiting: Callable[[str], None] | None = None,
        *,
        anew: bool = False,
    ) -> BuildLease | RootRecord:
        """The root that another builder commits meanwhile, or the lease to build it under.

        `waiting` is told the holder that is waited for. Ends when the other ends or runs out.
        `anew` asks for the lease even where there is a root.
        """
        while True:
            generation = await self._catalog.active_generation()
            root = None if anew else await self._root(key, generation)
            if root is not None:
                return root
            claimed = await self._claim(key, generation)
            if isinstance(claimed, BuildLease):
                root = None if anew else await self._root(key, generation)
                if root is not None:
                    await claimed.release()
                    return root
                if await self._catalog.active_generation() == generation:
                    return claimed
                await claimed.release()
                continue
            if waiting is not None:
                waiting(claimed)
            await self._sleep(self._times.poll)

    async def _root(self, key: ImageKey, generation: int) -> RootRecord | None:
        try:
            return await self._catalog.root_in(key, generation)
        except NotFound:
            return None

    async def _claim(self, key: ImageKey, generation: int) -> BuildLease | str:
        """The lease, or the holder of the one that is in force."""
        store, where = self._catalog.store, self._catalog.keys.build_lease(key)
        token = secrets.token_hex(4)
        record = LeaseRecord(
            "build", f"{self._holder}.{token}", self._times.ttl, generation=generation
        )
        lease = BuildLease(self._catalog, self._clock, key, record)
        if await store.put(where, record.encode(), only_if_absent=True):
            if await self._atomic() or await self._stayed(where, record):
                return lease
            return "another builder"
        try:
            stat = await store.stat(where)
            there = LeaseRecord.decode(await store.get(where, limit=MAX_RECORD))
        except NotFound:
            return "a builder that has just ended"
        except Corrupt:
            there = replace(record, holder="nobody", ttl_seconds=0)
        if there.holder == record.holder:
            return lease  # our own put, whose first answer was lost
        in_time = await self._clock.now() - stat.modified <= there.ttl_seconds
        if in_time and not is_dead(there.holder):
            return there.holder
        log.info("taking over the build that %s left", there.holder)
        await store.put(where, record.encode())
        return lease if await self._stayed(where, record) else "another builder"

    async def _stayed(self, where: str, record: LeaseRecord) -> bool:
        """Whether our word is still there a moment later: of several writers the last one wins."""
        await self._sleep(self._times.settle)
        try:
            there = LeaseRecord.decode(await self._catalog.store.get(where, limit=MAX_RECORD))
        except (NotFound, Corrupt):
            return False
        return there.holder == record.holder

    async def _atomic(self) -> bool:
        atomic = await self._catalog.store.claims_are_atomic()
        if not atomic and not self._warned:
            self._warned = True
            log.warning(
                "the store ignores conditions on a put: two builders of one image that start in "
                "the same second may both build it, which costs work and nothing else"
            )
        return atomic
