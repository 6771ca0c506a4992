"""Devices that fail as told: delay, error, short and corrupt answers, driven by a script.

A script is read once per request: words separated by blanks, one per request, the last one for ever
(`*N` repeats a word). `ok`; `delay:SECONDS`; `error:NAME` (an errno's name); `short` (fewer bytes
than asked, which the server must notice); `corrupt` (one bit flipped). Words may be joined by `+`.
Example: `ok*3 delay:0.2+error:EIO ok` fails the fourth request, late.
"""

import asyncio
import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nbdserver.device import BaseDevice, Buffer, Device, DeviceError, Extent


@dataclass(frozen=True)
class Fault:
    """What happens to one request: `delay` in seconds, `error` an errno or 0."""

    delay: float = 0.0
    error: int = 0
    short: bool = False
    corrupt: bool = False

    @property
    def harmless(self) -> bool:
        """The request passes untouched."""
        return not (self.delay or self.error or self.short or self.corrupt)


def parse_script(text: str) -> list[Fault]:
    """The faults of a script, in order. Raises ValueError with the word that is wrong."""
    faults: list[Fault] = []
    for word in text.split():
        body, star, times = word.partition("*")
        if star and not (times.isdigit() and 0 < int(times) <= 1_000_000):
            raise ValueError(f"a repetition that is no number: {word!r}")
        faults += [_parse_word(body)] * (int(times) if star else 1)
    if not faults:
        raise ValueError("an empty fault script")
    return faults


def _parse_word(word: str) -> Fault:
    delay, error, short, corrupt = 0.0, 0, False, False
    for part in word.split("+"):
        name, _, value = part.partition(":")
        if name == "delay":
            delay = float(value)
            if not 0 <= delay <= 3600:
                raise ValueError(f"a delay out of range: {word!r}")
        elif name == "error":
            found = getattr(errno, value, None)
            if not isinstance(found, int):
                raise ValueError(f"no errno of that name: {word!r}")
            error = found
        elif part == "short":
            short = True
        elif part == "corrupt":
            corrupt = True
        elif part != "ok":
            raise ValueError(f"not a word of fault scripts: {word!r}")
    return Fault(delay, error, short, corrupt)


class FaultyDevice(BaseDevice):
    """Any device behind a script. Reads and writes take one word each, in order of arrival."""

    def __init__(self, base: Device, script: str) -> None:
        self.base = base
        self._words = _endless(parse_script(script))
        self.size = base.size
        self.read_only = base.read_only
        self.block_sizes = base.block_sizes
        self.description = base.description
        self.contexts = base.contexts
        self.can_flush, self.can_fua = base.can_flush, base.can_fua
        self.can_trim, self.can_zero = base.can_trim, base.can_zero
        self.can_fast_zero, self.can_cache = base.can_fast_zero, base.can_cache
        self.can_multi_conn, self.is_rotational = base.can_multi_conn, base.is_rotational

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """One word's worth of trouble."""
        fault = await self._trouble()
        if fault.short or fault.corrupt:
            data = bytearray(await self.base.read_copied(offset, length))
            if fault.corrupt:
                data[length // 2] ^= 1
            return (bytes(data[: length - 1] if fault.short else data),)
        return await self.base.read(offset, length)

    async def read_copied(self, offset: int, length: int) -> bytes:
        """Untouched: this is the way around a fault."""
        return await self.base.read_copied(offset, length)

    async def _trouble(self) -> Fault:
        fault = next(self._words)
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.error:
            raise DeviceError(fault.error, "as the fault script says")
        return fault

    def pin(self, offset: int, length: int) -> Callable[[], None]:
        """The base's."""
        return self.base.pin(offset, length)

    async def write(self, offset: int, payload: Buffer, *, fua: bool) -> None:
        """One word's worth of trouble; `short` writes all but the last byte and fails."""
        fault = await self._trouble()
        body = bytearray(payload)
        if fault.corrupt:
            body[len(body) // 2] ^= 1
        if fault.short:
            if len(body) > 1:
                await self.base.write(offset, bytes(body[:-1]), fua=fua)
            raise DeviceError(errno.EIO, "a short write, as the fault script says")
        await self.base.write(offset, bytes(body), fua=fua)

    async def flush(self) -> None:
        """One word's delay or error."""
        await self._trouble()
        await self.base.flush()

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        """One word's delay or error."""
        await self._trouble()
        await self.base.trim(offset, length, fua=fua)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, no_hole: bool, fast: bool
    ) -> None:
        """One word's delay or error."""
        await self._trouble()
        await self.base.write_zeroes(offset, length, fua=fua, no_hole=no_hole, fast=fast)

    async def cache(self, offset: int, length: int) -> None:
        """Untouched."""
        await self.base.cache(offset, length)

    async def extents(
        self, context: str, offset: int, length: int, *, one: bool
    ) -> Sequence[Extent]:
        """Untouched."""
        return await self.base.extents(context, offset, length, one=one)

    def observe(self, batch: Sequence[tuple[int, int, bool]]) -> None:
        """The base's."""
        self.base.observe(batch)


def _endless(faults: list[Fault]) -> Iterator[Fault]:
    yield from faults
    while True:
        yield faults[-1]
