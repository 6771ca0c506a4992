"""The task that keeps the sets of one keeper: it looks at their pods and takes the next step."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

from cube.keeper.keeper import Keeper
from cube.keeper.record import Record
from cube.keeper.sets import SetStatus, members, new_member, next_step, set_status
from cube.pod.model import PodSet
from imagecache.errors import CubecacheError, LimitExceeded, NotFound

_LOG = logging.getLogger("cube.keeper")
SET_LIMIT: Final = 100
_LOOK_SECONDS: Final = 1.0


class SetKeeper:
    """Sets over a keeper's pods; `open` after the keeper, `close` before it."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._sets: dict[str, PodSet] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Reads the sets and begins to keep them."""
        sets = await self._keeper.with_record(Record.sets)
        self._sets = {one.key: one for one in sets}
        self._task = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Leaves the pods as they are."""
        tasks = [*self._leaving.values(), *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def apply(self, wanted: PodSet) -> SetStatus:
        """Makes the set be, or be another; its pods follow."""
        if wanted.key not in self._sets and len(self._sets) >= SET_LIMIT:
            raise LimitExceeded(f"there are {SET_LIMIT} sets on this host already")
        await self._keeper.check_driver(wanted.template)
        await self._keeper.with_record(lambda record: record.save_set(wanted))
        self._sets[wanted.key] = wanted
        return self.get(wanted.key)

    def get(self, key: str) -> SetStatus:
        """A set's status; NotFound."""
        return set_status(self._wanted(key), self._keeper.statuses())

    def statuses(self) -> list[SetStatus]:
        """All sets."""
        return [self.get(key) for key in self._sets]

    async def wait(self, key: str, seconds: float) -> SetStatus:
        """The set's status once it is as wanted, or when the time is up."""
        deadline = time.monotonic() + seconds
        while not (status := self.get(key)).settled and time.monotonic() < deadline:
            await self._keeper.next_change(deadline - time.monotonic())
        return status

    async def delete(self, key: str, grace_seconds: float | None) -> SetStatus:
        """Forgets the set and deletes its pods; returns when their machines are gone."""
        wanted = self._wanted(key)
        await self._keeper.with_record(lambda record: record.forget_set(key))
        del self._sets[key]
        leaving = [task for name, task in self._leaving.items() if name.startswith(f"{key}-")]
        mine = [one.key for one in members(wanted, self._keeper.statuses())]
        ends = [self._keeper.delete(one, grace_seconds) for one in mine]
        results = await asyncio.gather(*ends, *leaving, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, NotFound):
                raise result
        return set_status(wanted, self._keeper.statuses())

    def _wanted(self, key: str) -> PodSet:
        wanted = self._sets.get(key)
        if wanted is None:
            raise NotFound(f"there is no set {key!r}", remedy="cubecache pod sets")
        return wanted

    async def _keep(self) -> None:
        while True:
            for wanted in list(self._sets.values()):
                await self._guarded(wanted.key, functools.partial(self._step, wanted))
            await asyncio.sleep(_LOOK_SECONDS)

    async def _step(self, wanted: PodSet) -> None:
        step = next_step(wanted, self._keeper.statuses())
        for key in step.delete:
            if key not in self._leaving:
                self._leaving[key] = asyncio.create_task(self._leave(key))
        for _ in range(step.start):
            await self._keeper.apply(new_member(wanted))

    async def _leave(self, key: str) -> None:
        async def end() -> None:
            await self._keeper.delete(key, None)

        try:
            await self._guarded(key, end)
        finally:
            self._leaving.pop(key, None)

    @staticmethod
    async def _guarded(key: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except NotFound:
            return
        except CubecacheError as error:
            _LOG.warning("set %s: %s", key, error)
