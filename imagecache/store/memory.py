"""A store in this process's memory: for tests, and for what is not worth keeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

from imagecache.errors import LimitExceeded, NotFound
from imagecache.store.base import (
    ObjectStat,
    Priority,
    RangePastEnd,
    check_key,
    check_prefix,
    check_range,
)


class MemoryStore:
    """Objects in a dict; tests may look at and damage `objects` behind the store's back."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self._modified: dict[str, float] = {}

    async def get(self, key: str, *, limit: int) -> bytes:
        """The whole object; NotFound, LimitExceeded."""
        body = self._body(key)
        if len(body) > limit:
            raise LimitExceeded(f"object {key} is {len(body)} bytes, over the limit of {limit}")
        return body

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """Write the object; False when `only_if_absent` found one."""
        check_key(key)
        content = await asyncio.to_thread(body.read_bytes) if isinstance(body, Path) else body
        if only_if_absent and key in self.objects:
            return False
        self.objects[key] = bytes(content)
        self._modified[key] = time.time()
        return True

    async def stat(self, key: str) -> ObjectStat:
        """Size and time of one object; NotFound."""
        return self._stat(key, len(self._body(key)))

    async def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """Every object under `prefix`, as of the first step."""
        check_prefix(prefix)
        found = [self._stat(key, len(body)) for key, body in self.objects.items()]
        for stat in sorted(found, key=lambda stat: stat.key):
            if stat.key.startswith(prefix):
                yield stat

    async def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""
        self.objects.pop(check_key(key), None)
        self._modified.pop(key, None)

    async def claims_are_atomic(self) -> bool:
        """True: one process, one dict."""
        return True

    async def close(self) -> None:
        """Nothing to end; the objects stay."""

    def _body(self, key: str) -> bytes:
        try:
            return self.objects[check_key(key)]
        except KeyError:
            raise NotFound(f"object {key} is not in the store") from None

    def _stat(self, key: str, size: int) -> ObjectStat:
        return ObjectStat(key=key, size=size, modified=self._modified.get(key, 0.0))


class MemoryReader:
    """Ranges of a MemoryStore's objects."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:  # noqa: ARG002 - the protocol's argument; memory has no queue to order
        """Exactly `length` bytes; NotFound, OriginProtocol past the end."""
        check_range(key, offset, length)
        body = self._store.objects.get(check_key(key))
        if body is None:
            raise NotFound(f"object {key} is not in the store")
        if offset + length > len(body):
            raise RangePastEnd(f"range {offset}+{length} runs past {key}'s end at {len(body)}")
        return body[offset : offset + length]

    def condemn(self, key: str) -> None:
        """Nothing stands between this reader and its origin."""

    async def close(self) -> None:
        """Nothing to end."""
