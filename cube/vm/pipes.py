"""Named pipes that a machine's process writes lines into, and which nobody else reads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path


class LinePipe:
    """A named pipe and the task that reads it, from `make` to `close`.

    What is written while nobody reads is dropped by a writer that does not wait, as Firecracker.
    """

    def __init__(
        self, path: Path, transport: asyncio.ReadTransport, reading: asyncio.Task[None]
    ) -> None:
        self._path = path
        self._transport = transport
        self._reading = reading

    @classmethod
    async def make(cls, path: Path, feed: Callable[[bytes], None]) -> LinePipe:
        """Makes the pipe; `feed` is given what comes, as it comes. Raises OSError."""
        descriptor = await asyncio.to_thread(_make, path)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
        )

        async def read() -> None:
            while received := await reader.read(65536):
                feed(received)

        return cls(path, transport, asyncio.create_task(read()))

    async def close(self) -> None:
        """Stops reading and removes the pipe."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._transport.close()
        self._path.unlink(missing_ok=True)


def _make(path: Path) -> int:
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)
    # Open for writing too: without a writer a reader would be told of an end.
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
