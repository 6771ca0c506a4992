"""A program or a connection inside a pod, from the caller's side of the keeper."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Final

import aiohttp

from cube.link import ProcessExit
from imagecache.errors import LimitExceeded, Unavailable, from_record

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2
_PIECE: Final = 64 * 1024


class PodSession:
    """Streams of one process in a pod. `messages` is read by one task; `exit` is set at its end."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self.exit: ProcessExit | None = None

    async def messages(self) -> AsyncIterator[tuple[int, bytes]]:
        """(stream, bytes) as they come, b"" at a stream's end; ends with the process.

        Raises what the keeper answered, Unavailable where the connection broke.
        """
        async for message in self._socket:
            if message.type is aiohttp.WSMsgType.BINARY and message.data:
                yield message.data[0], message.data[1:]
            elif message.type is aiohttp.WSMsgType.TEXT:
                answer = json.loads(message.data)
                if "error" in answer:
                    raise from_record(answer["error"])
                self.exit = ProcessExit(**answer["exit"])
                return
        raise Unavailable("the keeper closed the connection before the program's end")

    async def write(self, content: bytes) -> None:
        """Feeds stdin."""
        for at in range(0, len(content), _PIECE):
            await self._socket.send_bytes(bytes([STDIN]) + content[at : at + _PIECE])

    async def end_input(self) -> None:
        """Closes stdin."""
        await self._socket.send_bytes(bytes([STDIN]))

    async def send_text(self, text: str) -> None:
        """A control message (`cube.keeper.server`)."""
        await self._socket.send_str(text)

    async def resize(self, rows: int, columns: int) -> None:
        """Tells the terminal's size."""
        await self.send_text(json.dumps({"resize": [rows, columns]}))

    async def signal(self, number: int) -> None:
        """Signals the program's process group."""
        await self.send_text(json.dumps({"signal": number}))

    async def communicate(self, stdin: bytes | None, *, limit: int) -> tuple[int, bytes, bytes]:
        """Feeds stdin whole, and collects what the program writes until its end."""
        feeding = asyncio.create_task(self._feed(stdin)) if stdin is not None else None
        kept = {STDOUT: bytearray(), STDERR: bytearray()}
        try:
            async for stream, content in self.messages():
                kept[stream] += content
                if sum(map(len, kept.values())) > limit:
                    raise LimitExceeded(f"the program wrote more than {limit} bytes")
        finally:
            if feeding is not None:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
        if self.exit is None:
            raise Unavailable("the program's end is not known")
        stderr = bytes(kept[STDERR]) or self.exit.problem.encode()
        return self.exit.code, bytes(kept[STDOUT]), stderr

    async def close(self) -> None:
        """Ends the connection, and with it the program."""
        await self._socket.close()

    async def _feed(self, content: bytes) -> None:
        await self.write(content)
        await self.end_input()
