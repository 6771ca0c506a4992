"""Scripted faults: wrappers that break reads and writes in a written order, for tests and drills.

A script is an iterable of letters, one per call, repeated by the caller if wanted; when it ends,
calls pass. `.` pass, `e` Unavailable, `t` Throttled, `n` NotFound, `d` Denied, `p` OriginProtocol,
`l` (lost) do it and then raise Unavailable, `h` hang; of reads also `f` flip a bit of the body,
`x` the bytes of another offset, `s` cut the body, `0` an empty body.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from imagecache.errors import CubecacheError, Denied, NotFound, Unavailable
from imagecache.store.base import (
    ObjectStat,
    OriginProtocol,
    Priority,
    RangeReader,
    Store,
    Throttled,
)

_ERRORS: dict[str, type[CubecacheError]] = {
    "e": Unavailable,
    "t": Throttled,
    "n": NotFound,
    "d": Denied,
    "p": OriginProtocol,
}


class Script:
    """The letters still to come; `calls` counts those taken."""

    def __init__(self, letters: Iterable[str]) -> None:
        self._letters = iter(letters)
        self.calls = 0

    async def before(self, key: str) -> str:
        """The next letter, after raising or hanging where it says so."""
        self.calls += 1
        letter = next(self._letters, ".")
        if letter in _ERRORS:
            raise _ERRORS[letter](f"scripted fault {letter!r} at {key}")
        if letter == "h":
            await asyncio.get_running_loop().create_future()
        return letter

    def after(self, letter: str, key: str) -> None:
        """Loses the answer of a call that was made."""
        if letter == "l":
            raise Unavailable(f"scripted fault: the answer for {key} was lost")


class FaultReader:
    """A RangeReader that follows a script."""

    def __init__(self, inner: RangeReader, script: Script) -> None:
        self._inner = inner
        self._script = script

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        """As the inner reader, or as the script says; then it breaks the protocol too."""
        letter = await self._script.before(key)
        if letter == "x":
            offset = offset + 1 if offset == 0 else offset - 1
        body = await self._inner.read(key, offset, length, priority=priority)
        self._script.after(letter, key)
        if letter == "f":
            middle = len(body) // 2
            return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if letter == "s":
            return body[: len(body) // 2]
        return b"" if letter == "0" else body

    def condemn(self, key: str) -> None:
        """Passed on."""
        self._inner.condemn(key)

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()


class FaultStore:
    """A Store that follows a script; listings break at their start or, by `l`, before their end."""

    def __init__(self, inner: Store, script: Script) -> None:
        self._inner = inner
        self._script = script

    async def get(self, key: str, *, limit: int) -> bytes:
        """As the inner store, or as the script says."""
        letter = await self._script.before(key)
        body = await self._inner.get(key, limit=limit)
        self._script.after(letter, key)
        return body

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """As the inner store, or as the script says."""
        letter = await self._script.before(key)
        written = await self._inner.put(key, body, only_if_absent=only_if_absent)
        self._script.after(letter, key)
        return written

    async def stat(self, key: str) -> ObjectStat:
        """As the inner store, or as the script says."""
        letter = await self._script.before(key)
        stat = await self._inner.stat(key)
        self._script.after(letter, key)
        return stat

    async def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        """As the inner store, or as the script says."""
        letter = await self._script.before(prefix)
        async for stat in self._inner.list(prefix):
            yield stat
            self._script.after(letter, prefix)

    async def delete(self, key: str) -> None:
        """As the inner store, or as the script says."""
        letter = await self._script.before(key)
        await self._inner.delete(key)
        self._script.after(letter, key)

    async def claims_are_atomic(self) -> bool:
        """As the inner store."""
        return await self._inner.claims_are_atomic()

    async def close(self) -> None:
        """Passed on."""
        await self._inner.close()
