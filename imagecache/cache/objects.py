"""Sealed objects kept on this host: layer indexes, block manifests, location tables.

They are immutable and named by digest, so a copy that matches is as good as the store's, and an
image whose objects are here can be attached while the store is away. The directory may be lost.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imagecache.blockimage.envelope import HEADER, MAX_PLAINTEXT, unseal
from imagecache.cache.slotfile import open_regular, set_aside
from imagecache.errors import Corrupt, CubecacheError
from imagecache.store.base import Store

log = logging.getLogger(__name__)


class ObjectCache:
    """Objects as the store has them, one file each, named by their digest in hex.

    Failing to keep one is never an error of the caller's. Least recently used ones go first, by
    the order in which this and earlier runs used them (a file's mtime is set at each use).
    """

    def __init__(self, directory: Path, store: Store, *, budget_bytes: int = 1 << 30) -> None:
        """The directory is made at the first use; the caller closes the store."""
        self.directory = directory
        self.budget_bytes = budget_bytes
        self.hits = self.misses = self.damaged = 0
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="objects")

    async def get(self, key: str, name: bytes, *, limit: int = MAX_PLAINTEXT) -> bytes:
        """The plaintext of the object `name`, from here or else from the store's `key`.

        Raises NotFound, Unavailable, Denied, Corrupt or LimitExceeded (over `limit` plaintext
        bytes), all of the store's copy only.
        """
        loop = asyncio.get_running_loop()
        plaintext = await loop.run_in_executor(self._thread, self._load, name, limit)
        if plaintext is not None:
            self.hits += 1
            return plaintext
        self.misses += 1
        sealed = await self._store.get(key, limit=limit + HEADER.size)
        plaintext = await loop.run_in_executor(None, _unseal, sealed, name, limit)
        await self.put(name, sealed)
        return plaintext

    async def put(self, name: bytes, sealed: bytes) -> None:
        """Keeps an object that the caller knows to be right, as the builder's fresh ones are."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._save, name, sealed)

    async def close(self) -> None:
        """Ends the thread."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)

    def _load(self, name: bytes, limit: int) -> bytes | None:
        path = self.directory / name.hex()
        if not path.is_symlink() and not path.exists():
            return None
        try:
            fd = open_regular(path)
            with os.fdopen(fd, "rb") as file:
                if os.fstat(fd).st_size > limit + HEADER.size:
                    raise Corrupt(f"object {name.hex()} has grown")
                plaintext = unseal(file.read(), name, limit=limit)
                os.utime(fd)
        except Corrupt as error:
            self.damaged += 1
            log.warning("%s; dropped", error)
            path.unlink(missing_ok=True)
            return None
        except (OSError, CubecacheError) as error:
            log.warning("object %s: %s", path, error)
            return None
        return plaintext

    def _save(self, name: bytes, sealed: bytes) -> None:
        if len(sealed) > self.budget_bytes:
            return
        path = self.directory / name.hex()
        temporary = self.directory / f".{secrets.token_hex(8)}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if path.is_dir() and not path.is_symlink():
                set_aside(path)
            try:
                with temporary.open("xb") as file:
                    file.write(sealed)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            self._trim()
        except (OSError, CubecacheError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            log.warning("object %s not kept: %s", name.hex(), "disk full" if full else error)

    def _trim(self) -> None:
        found: list[tuple[int, int, str]] = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.budget_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= size


def _unseal(sealed: bytes, name: bytes, limit: int) -> bytes:
    return unseal(sealed, name, limit=limit)
