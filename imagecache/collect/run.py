"""The runner: does what the planner says, a fence before each batch. Kill it anywhere.

One run deletes what was due when it began, which is what a dry run lists, and then moves
generations forward as far as they go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from imagecache.blockimage.generations import State
from imagecache.blockimage.holdings import TombstoneRecord
from imagecache.catalog import Catalog
from imagecache.collect import plan
from imagecache.collect.copying import ImageCopier
from imagecache.collect.plan import TOMBSTONES_PER_RECORD, Copying, Doomed, Policy, Sweep
from imagecache.collect.report import CollectReport
from imagecache.collect.snapshot import Roots, Snapshot, SnapshotReader
from imagecache.collect.work import ForEach, in_parallel
from imagecache.errors import Corrupt, CubecacheError, NotFound
from imagecache.leases.build import new_holder
from imagecache.leases.clock import StoreClock
from imagecache.leases.collector import CollectorLease

log = logging.getLogger(__name__)

BATCH = 100
PASSES = 16


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller of one collection asked for."""

    policy: Policy = field(default_factory=Policy)
    dry_run: bool = False
    delete_many: bool = False


class Collector:
    """One collection of one realm; used once."""

    def __init__(
        self,
        catalog: Catalog,
        wishes: Wishes | None = None,
        *,
        wall: Callable[[], float] = time.time,
        for_each: ForEach = in_parallel,
        holder: str | None = None,
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._wishes = wishes or Wishes()
        self._wall = wall
        self._for_each = for_each
        self._clock = StoreClock(catalog)
        self._holder = holder or new_holder()
        self._lease = CollectorLease(catalog, self._clock, holder=self._holder)
        self._reader = SnapshotReader(catalog, self._clock.now, for_each)
        self._copier = ImageCopier(catalog, self._lease.fence)

    async def run(self) -> CollectReport:
        """Collects. Raises Denied for too large a sweep, Busy, Unsupported for clocks that differ,

        and Corrupt or Unavailable where the realm cannot be read for certain: then nothing was
        deleted.
        """
        await self._clock.require_agreement(self._wall())
        if self._wishes.dry_run:
            snapshot = await self._reader.read()
            return CollectReport.begin(
                snapshot, plan.plan_sweep(snapshot, self._wishes.policy), dry_run=True
            )
        await self._lease.acquire()
        try:
            return await self._collect()
        finally:
            # A lease that cannot be given back now runs out by itself.
            with suppress(CubecacheError):
                await self._lease.release()

    async def _collect(self) -> CollectReport:
        policy = self._wishes.policy
        snapshot = await self._reader.read()
        sweep = plan.plan_sweep(snapshot, policy)
        report = CollectReport.begin(snapshot, sweep, dry_run=False)
        if not self._wishes.delete_many:
            plan.require_moderate(sweep, snapshot, policy)
        await self._sweep(sweep, report)
        opened = plan.due_to_open(snapshot, policy)
        if opened is not None:
            await self._mark(opened, State.ACTIVE, report)
        await self._move_on(report)
        return report

    async def _mark(self, number: int, state: State, report: CollectReport) -> None:
        await self._lease.fence()
        await self._catalog.mark(number, state)
        report.states.append(f"{number} {state.word}")

    # --- deleting

    async def _sweep(self, sweep: Sweep, report: CollectReport) -> None:
        async def delete(doomed: Doomed) -> None:
            await self._store.delete(doomed.key)
            report.deleted += 1
            report.deleted_bytes += doomed.size

        remaining = iter(sweep.doomed)
        while batch := list(islice(remaining, BATCH)):
            await self._lease.fence()
            await self._for_each(delete, batch)
        for at in range(0, len(sweep.tombstones), TOMBSTONES_PER_RECORD):
            await self._lease.fence()
            names = sweep.tombstones[at : at + TOMBSTONES_PER_RECORD]
            key = f"{self._catalog.keys.collections}{self._holder}.{at:08d}.json"
            await self._store.put(key, TombstoneRecord(sweep.newest, names).encode())
        for number in sweep.finished:
            await self._mark(number, State.DELETED, report)
        for key in sweep.spent:
            await self._store.delete(key)

    # --- moving on

    async def _move_on(self, report: CollectReport) -> None:
        """Retires, copies what is live, closes and expires; each pass begins with a new look."""
        stuck: dict[int, set[str]] = {}
        for _ in range(PASSES):
            now = await self._clock.now()
            before = await self._catalog.generations()
            target = plan.target_of(before)
            if target is None:
                return
            holders = await self._reader.holders()
            retiring = plan.due_to_retire(before, holders.builders, now)
            for number in retiring:
                await self._mark(number, State.RETIRED, report)
            if retiring:
                continue
            roots: dict[int, Roots] = {}
            for known in before:
                if known.readable and known.number <= target:
                    roots[known.number] = await self._reader.roots(known.number)
            copies = plan.due_to_copy(before, target, roots, holders.live(now))
            fresh = [x for x in copies if x.name not in stuck.get(x.source, ())]
            if fresh:
                await self._copy(fresh, roots, stuck, report)
                continue
            held_back = {number for number, names in stuck.items() if names}
            due = plan.due_to_close(before, target, now, self._wishes.policy)
            closing = [number for number in due if number not in held_back]
            for number in closing:
                await self._mark(number, State.CLOSING, report)
            if closing:
                continue
            after = await self._catalog.generations()
            for number in plan.due_to_expire(before, after, target):
                if number not in held_back:
                    await self._mark(number, State.EXPIRED, report)
            return

    async def _copy(
        self,
        copies: Sequence[Copying],
        roots: dict[int, Roots],
        stuck: dict[int, set[str]],
        report: CollectReport,
    ) -> None:
        done = []
        for work in copies:
            try:
                await self._copier.copy(work, roots[work.source][work.name])
            except (NotFound, Corrupt) as error:
                # Its generation stays until it is repaired or nobody relies on it.
                stuck.setdefault(work.source, set()).add(work.name)
                report.problems.append(f"image {work.image}: {error}")
                log.error("image %s cannot be moved: %s", work.image, error)
                continue
            report.copied.append(work.image)
            done.append(work)
        await self._copier.copy_starts(done)


def snapshot_reader(catalog: Catalog, for_each: ForEach = in_parallel) -> SnapshotReader:
    """A reader of snapshots for those who only look."""
    return SnapshotReader(catalog, StoreClock(catalog).now, for_each)


__all__ = ["Collector", "Snapshot", "Wishes", "snapshot_reader"]
