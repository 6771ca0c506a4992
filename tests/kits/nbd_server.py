"""An nbdserver in a thread of its own, so that blocking clients can be tested against it."""

import asyncio
import errno
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nbdserver.device import BaseDevice, Buffer, DeviceError, Extent
from nbdserver.exports import Exports, StaticExports
from nbdserver.limits import Limits
from nbdserver.negotiation import TlsPolicy
from nbdserver.server import Server

T = TypeVar("T")


class MemoryDevice(BaseDevice):
    """A disk in memory that counts its pins, and can be told to miss, wait or fail."""

    can_flush = can_fua = can_trim = can_zero = can_fast_zero = can_cache = can_multi_conn = True
    contexts = ("base:allocation", "x-test:parity")

    def __init__(self, size: int = 1 << 20, *, read_only: bool = False, hits: bool = True) -> None:
        self.data = bytearray(pattern(0, size))
        self.size = size
        self.read_only = read_only
        self.hits = hits
        self.pinned = 0
        self.flushes = 0
        self.gate: asyncio.Event | None = None
        self.error = 0
        self.observed: list[tuple[int, int, bool]] = []
        self.cached: list[tuple[int, int]] = []
        self.quick_writes = True

    def try_read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        if not self.hits or self.error or self.gate is not None:
            return None
        return (memoryview(bytes(self.data[offset : offset + length])),)

    async def read_copied(self, offset: int, length: int) -> bytes:
        await self._pass()
        return bytes(self.data[offset : offset + length])

    async def _pass(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.error:
            raise DeviceError(self.error, "as the test asked")

    def pin(self, offset: int, length: int) -> Callable[[], None]:
        self.pinned += 1

        def release() -> None:
            self.pinned -= 1

        return release

    def try_write(self, offset: int, payload: Buffer) -> bool:
        if not self.quick_writes or self.error or self.gate is not None:
            return False
        self.data[offset : offset + len(payload)] = payload
        return True

    async def write(self, offset: int, payload: Buffer, *, fua: bool) -> None:
        await self._pass()
        self.data[offset : offset + len(payload)] = payload
        self.flushes += fua

    async def flush(self) -> None:
        await self._pass()
        self.flushes += 1

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        self.data[offset : offset + length] = bytes(length)

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool, no_hole: bool, fast: bool
    ) -> None:
        if fast and no_hole:
            raise DeviceError(errno.EOPNOTSUPP)
        self.data[offset : offset + length] = bytes(length)

    async def cache(self, offset: int, length: int) -> None:
        self.cached.append((offset, length))

    async def extents(
        self, context: str, offset: int, length: int, *, one: bool
    ) -> Sequence[Extent]:
        await self._pass()
        extents, end = [], offset + length
        while offset < end:
            step = 65536 - offset % 65536
            extents.append(Extent(step, offset // 65536 % 2 * (3 if context[0] == "b" else 7)))
            offset += step
        return extents

    def observe(self, batch: Sequence[tuple[int, int, bool]]) -> None:
        self.observed += batch


def pattern(offset: int, length: int) -> bytes:
    """Bytes that tell where they are: each 8-byte word is its own offset."""
    first, last = offset // 8, (offset + length + 7) // 8
    words = b"".join((index * 8 + 1).to_bytes(8, "big") for index in range(first, last))
    return words[offset % 8 : offset % 8 + length]


class ServerThread:
    """A context manager: a Server on its own loop and thread, listening on `path`."""

    def __init__(
        self,
        path: Path,
        exports: Exports | dict[str, Any] | BaseDevice,
        *,
        limits: Limits | None = None,
        tls: TlsPolicy | None = None,
        listen: bool = True,
    ) -> None:
        if isinstance(exports, BaseDevice):
            exports = {"disk": exports}
        self.exports: Exports = StaticExports(exports) if isinstance(exports, dict) else exports
        self.path = path
        self._limits, self._tls, self._listen = limits, tls, listen
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self.server: Server

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            self.server = Server(limits=self._limits, tls=self._tls)
            if self._listen:
                self.server.listen_unix(self.path, self.exports)
            self._started.set()
            await self._stop.wait()
            await self.server.close()
            # Sockets are closed by callbacks of the loop's next turns.
            await asyncio.sleep(0)

        try:
            asyncio.run(main())
        except BaseException as failure:
            self._failure = failure
            self._started.set()

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        assert self._started.wait(60)
        if self._failure:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()
        if self._failure:
            raise self._failure

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def do(self, function: Callable[[], T]) -> T:
        """Call a function on the server's loop and wait for it."""

        async def run() -> T:
            return function()

        return self.call(run())

    @property
    def uri(self) -> str:
        """The NBD URI of the default export."""
        return f"nbd+unix:///?socket={self.path}"
