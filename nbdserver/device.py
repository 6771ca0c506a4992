"""What the server serves: the Device protocol, and base classes with the defaults.

A device never lets Python touch a mapped page; it hands out buffers and the kernel copies them.
The server validates every request against the device's size, sizes of blocks and features, so that
offsets and lengths that arrive here are in range, not empty and aligned to `block_sizes.minimum`.
"""

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nbdserver.protocol.constants import BASE_ALLOCATION, STATE_HOLE, STATE_ZERO
from nbdserver.protocol.replies import Extent

__all__ = [
    "BASE_ALLOCATION",
    "STATE_HOLE",
    "STATE_ZERO",
    "BaseDevice",
    "BlockSizes",
    "Buffer",
    "Device",
    "DeviceError",
    "Extent",
    "ReadOnlyDevice",
]

Buffer = bytes | bytearray | memoryview


class DeviceError(Exception):
    """A request that failed; `errno` is mapped to the protocol's error values at the last hop."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or os.strerror(number))
        self.errno = number


@dataclass(frozen=True)
class BlockSizes:
    """Bytes: smallest addressable unit, unit of efficient access, largest payload of one request.

    Raises ValueError where the protocol document does not allow the combination.
    """

    minimum: int = 1
    preferred: int = 4096
    maximum: int = 32 << 20

    def __post_init__(self) -> None:
        def power_of_two(number: int) -> bool:
            return number > 0 and number & (number - 1) == 0

        if not (power_of_two(self.minimum) and self.minimum <= 65536):
            raise ValueError(f"minimum block size {self.minimum}")
        if not (power_of_two(self.preferred) and self.preferred >= max(self.minimum, 512)):
            raise ValueError(f"preferred block size {self.preferred}")
        if not self.preferred <= self.maximum <= 0xFFFFFFFF:
            raise ValueError(f"maximum payload {self.maximum}")


class Device(Protocol):
    """A disk of `size` bytes. One object may serve many connections; it has no per-client state.

    Failures are DeviceError. Buffers answered by `try_read` and `read` stay valid until the caller
    suspends, or, if it pinned their range before that, until it releases the pin.
    """

    @property
    def size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def block_sizes(self) -> BlockSizes: ...
    @property
    def description(self) -> str: ...
    @property
    def contexts(self) -> Sequence[str]:
        """Metadata contexts that `extents` answers, `base:allocation` among them."""
        ...

    @property
    def can_flush(self) -> bool: ...
    @property
    def can_fua(self) -> bool: ...
    @property
    def can_trim(self) -> bool: ...
    @property
    def can_zero(self) -> bool: ...
    @property
    def can_fast_zero(self) -> bool: ...
    @property
    def can_cache(self) -> bool: ...
    @property
    def can_multi_conn(self) -> bool:
        """A flush, or a write with FUA, on one connection is visible on all others."""
        ...

    @property
    def is_rotational(self) -> bool: ...

    def try_read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """On the loop: buffers of exactly `length` bytes together, or None for "not now"."""
        ...

    async def read(self, offset: int, length: int) -> Sequence[Buffer]: ...

    async def read_copied(self, offset: int, length: int) -> bytes:
        """A private copy, read without touching mapped pages: after EFAULT, and for TLS."""
        ...

    def pin(self, offset: int, length: int) -> Callable[[], None]:
        """Keep buffers just handed out for this range valid until the result is called."""
        ...

    def try_write(self, offset: int, payload: Buffer) -> bool:
        """On the loop: write now without blocking, or answer False and leave it to `write`."""
        ...

    async def write(self, offset: int, payload: Buffer, *, fua: bool) -> None: ...
    async def flush(self) -> None: ...
    async def trim(self, offset: int, length: int, *, fua: bool) -> None: ...
    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, no_hole: bool, fast: bool
    ) -> None: ...
    async def cache(self, offset: int, length: int) -> None: ...

    async def extents(
        self, context: str, offset: int, length: int, *, one: bool
    ) -> Sequence[Extent]:
        """Extents from `offset` on, at least one; `one`: the first is enough."""
        ...

    def observe(self, batch: Sequence[tuple[int, int, bool]]) -> None:
        """(offset, length, hit) of reads answered; one call per batch, on the loop."""
        ...

    async def close(self) -> None: ...


class BaseDevice:
    """Defaults of everything that a device may leave out. A subclass sets `size` and reads."""

    size: int = 0
    read_only: bool = True
    block_sizes: BlockSizes = BlockSizes()
    description: str = ""
    contexts: Sequence[str] = (BASE_ALLOCATION,)
    can_flush: bool = False
    can_fua: bool = False
    can_trim: bool = False
    can_zero: bool = False
    can_fast_zero: bool = False
    can_cache: bool = False
    can_multi_conn: bool = False
    is_rotational: bool = False

    def try_read(self, offset: int, length: int) -> Sequence[Buffer] | None:  # noqa: ARG002
        """Nothing can be read without waiting."""
        return None

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """Answer a private copy."""
        return (await self.read_copied(offset, length),)

    async def read_copied(self, offset: int, length: int) -> bytes:
        """A device must say how it reads; this one has no bytes."""
        raise DeviceError(errno.EIO, f"no data at {offset}+{length}")

    def pin(self, offset: int, length: int) -> Callable[[], None]:  # noqa: ARG002
        """Buffers that nobody reuses need no pin."""
        return _nothing

    def try_write(self, offset: int, payload: Buffer) -> bool:  # noqa: ARG002
        """No write is known to be quick."""
        return False

    async def write(self, offset: int, payload: Buffer, *, fua: bool) -> None:  # noqa: ARG002
        """Read-only devices refuse."""
        raise DeviceError(errno.EPERM)

    async def flush(self) -> None:
        """Nothing was written."""

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:  # noqa: ARG002
        """Read-only devices refuse."""
        raise DeviceError(errno.EPERM)

    async def write_zeroes(
        self,
        offset: int,  # noqa: ARG002
        length: int,  # noqa: ARG002
        *,
        fua: bool,  # noqa: ARG002
        no_hole: bool,  # noqa: ARG002
        fast: bool,  # noqa: ARG002
    ) -> None:
        """Read-only devices refuse."""
        raise DeviceError(errno.EPERM)

    async def cache(self, offset: int, length: int) -> None:
        """Caching is a hint; ignoring it is right."""

    async def extents(
        self,
        context: str,  # noqa: ARG002
        offset: int,  # noqa: ARG002
        length: int,
        *,
        one: bool,  # noqa: ARG002
    ) -> Sequence[Extent]:
        """All is allocated, nothing is known to be zero."""
        return (Extent(length, 0),)

    def observe(self, batch: Sequence[tuple[int, int, bool]]) -> None:
        """Nobody watches. (The server does not even gather a batch for this very method.)"""

    async def close(self) -> None:
        """Nothing is open."""


class ReadOnlyDevice(BaseDevice):
    """A device that nothing can change, so that connections may share it freely."""

    read_only = True
    can_multi_conn = True


def _nothing() -> None:
    """Release nothing."""
