"""Passing an arena to a successor process: frozen here, looked at there, then claimed for good.

Until it has claimed the lock the successor writes nothing, so that the predecessor may go on as if
nothing had happened. All of it is called on the arena's loop.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from imagecache.cache.indexqueue import IndexQueue
from imagecache.cache.lock import DirectoryLock
from imagecache.errors import Unavailable

FREEZE_SECONDS = 20.0


class Passing(ABC):
    """The half of an arena that freezes and claims it."""

    def __init__(self, lock: DirectoryLock | None, index: IndexQueue) -> None:
        self._lock = lock
        self._index = index
        self._tasks: set[asyncio.Task[None]] = set()
        self._writes = 0  # under way
        self._quiet = asyncio.Event()  # no write is under way
        self._quiet.set()
        self._open = asyncio.Event()  # unset while nothing may be written
        self._open.set()

    @property
    def lock_fd(self) -> int:
        """The lock's descriptor, to pass to a successor."""
        if self._lock is None:
            raise Unavailable("this arena is only looked at")
        return self._lock.fd

    async def freeze(self) -> None:
        """Writes nothing until `thaw`: admissions wait, and all that was admitted is in the index.

        Raises Unavailable where the disk does not finish what it was given: it is not frozen then.
        """
        self._open.clear()
        frozen = False
        try:
            async with asyncio.timeout(FREEZE_SECONDS):
                await self._quiet.wait()
                await self._end_tasks()
                if not await self._index.flush():
                    raise Unavailable("the cache's index cannot be written")
            frozen = True
        except TimeoutError as error:
            raise Unavailable("the cache's disk does not finish its writes") from error
        finally:
            if not frozen:
                await self._end_tasks()
                self.thaw()

    def thaw(self) -> None:
        """Goes on after `freeze`."""
        self._start(*self._upkeep())
        self._open.set()

    async def claim(self, lock_fd: int, directory: Path) -> None:
        """Makes an arena that was looked at this process's own; Busy where `lock_fd` is not it."""
        loop = asyncio.get_running_loop()
        self._lock = await loop.run_in_executor(None, DirectoryLock.adopt, lock_fd, directory)
        await loop.run_in_executor(None, self._tidy)
        self.thaw()

    def let_go(self) -> None:
        """After `freeze`: what a successor owns is not written any more, not even by `close`."""
        self._index.forget()

    def _begun(self) -> None:
        self._writes += 1
        self._quiet.clear()

    def _ended(self) -> None:
        self._writes -= 1
        if not self._writes:
            self._quiet.set()

    def _start(self, *jobs: Coroutine[Any, Any, None]) -> None:
        for job in jobs:
            task = asyncio.get_running_loop().create_task(job)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _end_tasks(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @abstractmethod
    def _upkeep(self) -> list[Coroutine[Any, Any, None]]:
        """What runs in the background while it may write."""

    @abstractmethod
    def _tidy(self) -> None:
        """What is given back once it may write. Blocking."""
