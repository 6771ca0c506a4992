"""The two protocols every store and every wrapper implements, and the rules all of them share."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from imagecache.errors import Unavailable, UsageError

MAX_KEY_BYTES = 800  # S3 allows 1024 with the URL's prefix
MAX_RANGE_BYTES = 256 << 20
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=@~:-]{0,199}")
_PREFIX = re.compile(
    r"(?:[A-Za-z0-9_][A-Za-z0-9._=@~:-]{0,199}/)*(?:[A-Za-z0-9_][A-Za-z0-9._=@~:-]{0,199})?"
)


class Priority(IntEnum):
    """The class of a read; a lower number goes first and never waits for a higher one."""

    DEMAND = 0
    PREFETCH = 1
    FILL = 2


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """One object as the store reports it: size in bytes, modified in the store's seconds."""

    key: str
    size: int
    modified: float


class Throttled(Unavailable):
    """The store asked us to slow down (429, 503); `retry_after` is seconds, where it said so."""

    def __init__(
        self, message: str, *, retry_after: float | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after = retry_after


class OriginProtocol(Unavailable):
    """The store answered against its own protocol: short or long body, wrong range, bad listing."""


class RangePastEnd(OriginProtocol):
    """The range does not end inside the object: the object is short, or the location is wrong."""


class Store(Protocol):
    """Control plane. Keys are `check_key`'s grammar, already realm-prefixed by the caller.

    Every call raises Unavailable (could not ask), Denied, or UsageError for a malformed key. A put
    is durable and visible to every reader when it returns; a failed or killed one leaves no object.
    """

    async def get(self, key: str, *, limit: int) -> bytes:
        """The whole object; NotFound, or LimitExceeded when it is over `limit` bytes."""
        ...

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """Write the object; True when written, False when `only_if_absent` found one there."""
        ...

    async def stat(self, key: str) -> ObjectStat:
        """Size and time of one object; NotFound."""
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """Every object whose key starts with `prefix`, in no order: complete, or it raises."""
        ...

    async def delete(self, key: str) -> None:
        """Remove the object; an absent one is fine."""
        ...

    async def claims_are_atomic(self) -> bool:
        """True when of two concurrent `only_if_absent` puts exactly one answers True, always."""
        ...

    async def close(self) -> None:
        """End connections and threads; safe to call twice."""
        ...


class RangeReader(Protocol):
    """Data plane: exact ranges of immutable objects."""

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        """Exactly `length` bytes from `offset`, or an error; never a short body.

        Raises NotFound, Denied, Unavailable (Throttled, OriginProtocol, RangePastEnd included).
        """
        ...

    def condemn(self, key: str) -> None:
        """The caller found that bytes read from `key` do not match their digest.

        The shared tier loses score and the next reads of `key` go to the origin.
        """
        ...

    async def close(self) -> None:
        """End connections and threads; safe to call twice."""
        ...


def is_segment(name: str) -> bool:
    """True for a name that can stand between two slashes of a key."""
    return _SEGMENT.fullmatch(name) is not None


def check_key(key: str) -> str:
    """The key itself when it is in the grammar, else UsageError.

    Segments of 1-200 of `A-Z a-z 0-9 . _ = @ ~ : -` that start with a letter, digit or `_`, joined
    by `/`; 800 bytes in all. No key may be a directory of another (`a` and `a/b`).
    """
    if len(key) > MAX_KEY_BYTES or not all(map(is_segment, key.split("/"))):
        raise UsageError(f"store key {key[:80]!r} is malformed")
    return key


def check_prefix(prefix: str) -> str:
    """The listing prefix itself (a key cut anywhere, or empty), else UsageError."""
    if len(prefix) > MAX_KEY_BYTES or not _PREFIX.fullmatch(prefix):
        raise UsageError(f"store prefix {prefix[:80]!r} is malformed")
    return prefix


def check_range(key: str, offset: int, length: int) -> None:
    """UsageError unless 0 <= offset, 0 < length <= MAX_RANGE_BYTES."""
    if offset < 0 or not 0 < length <= MAX_RANGE_BYTES:
        raise UsageError(f"range {offset}+{length} of {key} is not readable")
