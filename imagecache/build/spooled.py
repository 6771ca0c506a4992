"""Images that can be read from the spool while the store has not got them yet.

A pack that waits for its upload is read where it lies: same key, same bytes, same check of each
chunk by its digest. So nothing moves when the upload ends; the next read goes to the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from imagecache.blockimage.records import RootRecord
from imagecache.errors import NoSpace, Unavailable
from imagecache.store.base import Priority, RangeReader


@dataclass(frozen=True, slots=True)
class SpooledImage:
    """An image whose layers are all converted: the root it will be committed by, if the store
    takes it, and the plaintext files of its manifest, location table and layer indexes."""

    root: RootRecord
    config: bytes
    objects: tuple[Path, ...]


class SpooledPacks:
    """Packs on this disk by the store's key, until the store has them or nobody reads them.

    Each has a link of its own in `directory`, so that a build that ends takes none away.
    """

    def __init__(self, directory: Path) -> None:
        """The directory is made when it is needed; nobody else writes into it."""
        self._directory = directory
        self._paths: dict[str, Path] = {}

    def clear(self) -> None:
        """Drops what a process that was killed left in the directory. Blocking."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, key: str) -> Path | None:
        """Where a pack lies, if it does."""
        return self._paths.get(key)

    async def add(self, key: str, path: Path) -> None:
        """Takes up a finished pack; raises NoSpace or Unavailable."""
        link = self._directory / blake3(key.encode()).hexdigest()
        await asyncio.to_thread(_link, path, link)
        self._paths[key] = link

    async def drop(self, key: str) -> None:
        """The store has the pack, or nobody reads it."""
        path = self._paths.pop(key, None)
        if path is not None:
            await asyncio.to_thread(path.unlink, missing_ok=True)

    async def keep(self, keys: Collection[str]) -> None:
        """Drops all packs but these."""
        for key in [key for key in self._paths if key not in keys]:
            await self.drop(key)


def _link(path: Path, link: Path) -> None:
    try:
        link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        link.unlink(missing_ok=True)
        os.link(path, link)
    except OSError as error:
        kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else Unavailable
        raise kind(f"cannot link {path} to {link}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class SpoolServing:
    """Who reads a build's image before it is stored: where its packs are noted, and whom to tell,
    once for each attempt, that all of it can be read."""

    packs: SpooledPacks
    on_readable: Callable[[SpooledImage], Awaitable[None]]


class SpoolReader:
    """A RangeReader that reads packs in the spool from there, and everything else from `inner`."""

    def __init__(self, inner: RangeReader, packs: SpooledPacks) -> None:
        self._inner = inner
        self._packs = packs

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        """As the inner reader."""
        path = self._packs.path(key)
        if path is not None:
            with contextlib.suppress(FileNotFoundError):  # stored a moment ago
                return await asyncio.to_thread(_read, path, offset, length)
        return await self._inner.read(key, offset, length, priority=priority)

    def condemn(self, key: str) -> None:
        """Passed on; what is wrong in the spool stays wrong until the store has it."""
        self._inner.condemn(key)

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()


def _read(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            body = os.pread(file.fileno(), length, offset)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unavailable(f"pack {path.name} in the spool: {error.strerror}") from error
    if len(body) != length:
        raise Unavailable(f"pack {path.name} in the spool is shorter than {offset + length} bytes")
    return body
