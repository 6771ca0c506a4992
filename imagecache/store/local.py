"""A store in a directory: one file per key, safe under kill -9 and with several processes.

A put writes a locked temp under `.tmp`, fsyncs it, renames it into place (or links it, where it
must not exist yet) and fsyncs the directory. The kernel drops the lock of a killed writer, so a
leftover is a temp that nobody locks; those older than `TEMP_AGE_S` by the file system's clock are
removed when a store is first used.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from imagecache.store import local_files as files
from imagecache.store.base import ObjectStat, Priority, check_key, check_prefix, check_range

R = TypeVar("R")

TEMP_AGE_S = 900.0


class LocalStore:
    """Control plane over a directory, which is made at the first use; all I/O in own threads."""

    def __init__(self, root: Path, *, threads: int = 4, temp_age_s: float = TEMP_AGE_S) -> None:
        self.root = root
        self._temps = root / files.TEMP_DIR
        self._temp_age_s = temp_age_s
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="store-local")
        self._opening = threading.Lock()
        self._opened = False
        self._synced_dirs: set[Path] = set()

    async def get(self, key: str, *, limit: int) -> bytes:
        """The whole object; NotFound, LimitExceeded."""
        return await self._call(key, partial(files.get_object, self.root, check_key(key), limit))

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """Write the object durably; False when `only_if_absent` found one. Also NoSpace."""
        return await self._call(key, partial(self._put, check_key(key), body, only_if_absent))

    async def stat(self, key: str) -> ObjectStat:
        """Size and time of one object; NotFound."""
        return await self._call(key, partial(files.stat_object, self.root, check_key(key)))

    async def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """Every object under `prefix`; what is put or deleted meanwhile may or may not show."""
        walking = files.walk(self.root, check_prefix(prefix))
        full = True
        while full:
            batch = await self._call(prefix, partial(files.next_batch, walking))
            full = len(batch) == files.LIST_BATCH
            for stat in batch:
                yield stat

    async def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""
        await self._call(key, partial(files.delete_object, self.root, check_key(key)))

    async def claims_are_atomic(self) -> bool:
        """True: link(2) decides."""
        return True

    async def close(self) -> None:
        """End the threads after what they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(self, key: str, work: Callable[[], R]) -> R:
        def run() -> R:
            with files.mapped_errors(self.root, key):
                self._open()
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)

    def _open(self) -> None:
        if self._opened:
            return
        with self._opening:
            if not self._opened:
                self._temps.mkdir(parents=True, exist_ok=True)
                files.reclaim_temps(self._temps, self._temp_age_s)
                self._opened = True

    def _put(self, key: str, body: bytes | Path, only_if_absent: bool) -> bool:
        path = self.root / key
        if only_if_absent and os.path.lexists(path) and not path.is_dir():
            self._sync_dirs(path.parent)  # its writer may die before it has done so
            return False
        with files.locked_temp(self._temps) as (temp, fd):
            if isinstance(body, Path):
                files.copy_into(body, fd)
            else:
                files.write_all(fd, body)
            os.fsync(fd)
            written = self._place(temp, path, only_if_absent)
        self._sync_dirs(path.parent)
        return written

    def _place(self, temp: Path, path: Path, only_if_absent: bool) -> bool:
        try:
            return files.place(temp, path, only_if_absent)
        except FileNotFoundError:
            # First key of its directory, or somebody removed the directory since we made it.
            self._synced_dirs.clear()
            path.parent.mkdir(parents=True, exist_ok=True)
            return files.place(temp, path, only_if_absent)
        except NotADirectoryError as error:
            raise FileExistsError(errno.EEXIST, "a part of the key is an object") from error

    def _sync_dirs(self, directory: Path) -> None:
        """fsync the directory, and once per process each one above it, the root's entry included.

        Another process may have made a directory and died before its fsync, so "it was there" does
        not mean that it is durable.
        """
        files.fsync_dir(directory)
        above = directory
        while above not in self._synced_dirs and above != self.root.parent:
            with contextlib.suppress(PermissionError):  # the root's parent need not be readable
                files.fsync_dir(above.parent)
            self._synced_dirs.add(above)
            above = above.parent


class LocalReader:
    """Ranges of files: open, check, pread in own threads.

    Descriptors are not kept: open and close cost a few microseconds beside the hop to the thread,
    and a kept one would go on reading an object that repair has replaced.
    """

    def __init__(self, root: Path, *, threads: int = 8) -> None:
        self.root = root
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="store-ranges")

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:  # noqa: ARG002 - the protocol's argument; LimitedReader orders the queue before us
        """Exactly `length` bytes; NotFound, OriginProtocol past the end."""
        check_key(key)
        check_range(key, offset, length)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, files.read_range, self.root, key, offset, length
        )

    def condemn(self, key: str) -> None:
        """Nothing stands between this reader and its origin."""

    async def close(self) -> None:
        """End the threads after what they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
