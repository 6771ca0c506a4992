"""A process in the guest as the host sees it: two output streams, its input, its end.

Also a TCP connection inside the guest is such a process: its input goes to the peer, its stdout
comes from it. The guest is not trusted: it cannot make the host keep more than it was granted.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cube.channel.messages import encode_size
from cube.frames import (
    INPUT_WINDOW,
    OUTPUT_WINDOW,
    PAYLOAD_LIMIT,
    Frame,
    FrameType,
    Key,
    Stream,
)
from cube.records import numbers, words
from imagecache.errors import Rejected, Unavailable

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_SIGNAL: Final = struct.Struct("<II")
_TO_GROUP: Final = 1
_TO_EVERYTHING: Final = 2
_GRANT_BYTES: Final = OUTPUT_WINDOW // 4  # grants are gathered up to this while more is kept
_PIECES: Final = 4096  # kept chunks of one stream: many tiny frames are joined


class Sender(Protocol):
    """What a process needs of its link."""

    def send(
        self, kind: FrameType, *, stream: int = 0, process: int = 0, payload: bytes = b""
    ) -> None:
        """Queues a frame."""


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process ended: `code` as a shell would say it (128 + signal); `problem` is set when
    it could not be started; `read_bytes` of its root disk; `out_of_memory` when the kernel ended
    something of its container for want of memory.
    """

    code: int
    signal: int = 0
    problem: str = ""
    read_bytes: int = 0
    out_of_memory: bool = False


class OutputStream:
    """Bytes a guest process wrote. One reader at a time. `lost`: bytes the guest dropped so far."""

    def __init__(self, link: Sender, process: int, stream: Stream) -> None:
        self.lost = 0
        self._link = link
        self._process = process
        self._stream = stream
        self._kept: deque[bytes] = deque()
        self._credit = OUTPUT_WINDOW
        self._owed = 0  # read, not granted yet
        self._ended = False
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        """The next bytes, or b"" at the end; grants the guest as much again."""
        while not self._kept:
            if self._ended:
                return b""
            self._changed.clear()
            await self._changed.wait()
        taken = self._kept.popleft()
        self._owed += len(taken)
        # After the end the same id may be another process's: it must not get this one's credit.
        if not self._ended and (not self._kept or self._owed >= _GRANT_BYTES):
            self._credit += self._owed
            self._link.send(
                FrameType.WINDOW,
                stream=self._stream,
                process=self._process,
                payload=_U32.pack(self._owed),
            )
            self._owed = 0
        return taken

    def accept(self, received: bytes) -> None:
        """Keeps bytes from the guest; raises Rejected when it overruns its window."""
        if len(received) > self._credit:
            raise Rejected("the guest sent more output than it was allowed to")
        self._credit -= len(received)
        if received and not self._ended:
            if len(self._kept) >= _PIECES:
                self._kept = deque([b"".join(self._kept)])
            self._kept.append(received)
            self._changed.set()

    def end(self) -> None:
        """No more bytes will come."""
        self._ended = True
        self._changed.set()


class GuestProcess:
    """A process in the guest, known by its container's id or by one that the host chose."""

    def __init__(self, link: Sender, identity: int) -> None:
        loop = asyncio.get_running_loop()
        self.id = identity
        self.stdout = OutputStream(link, identity, Stream.STDOUT)
        self.stderr = OutputStream(link, identity, Stream.STDERR)
        self.exited: asyncio.Future[ProcessExit] = loop.create_future()
        # The guest knows the process from here on; frames for it that come earlier are ignored.
        self.started = asyncio.Event()
        self._link = link
        self._input_credit = INPUT_WINDOW
        self._granted = asyncio.Event()
        self._closed: asyncio.Future[None] = loop.create_future()

    async def wait(self, *, seconds: float | None = None) -> ProcessExit:
        """How it ended; raises Unavailable when the channel closed or the time was up first."""
        waited: set[asyncio.Future[Any]] = {self.exited, self._closed}
        await asyncio.wait(waited, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self.exited.done():
            return self.exited.result()
        reason = "its machine's channel closed" if self._closed.done() else f"{seconds:g} s passed"
        raise Unavailable(f"the end of process {self.id} is not known: {reason}")

    def signal(self, number_: int, *, group: bool = False, everything: bool = False) -> None:
        """Sends a signal to the program, its process group, or everything in its container."""
        flags = (_TO_GROUP if group else 0) | (_TO_EVERYTHING if everything else 0)
        self._link.send(FrameType.SIGNAL, process=self.id, payload=_SIGNAL.pack(number_, flags))

    def resize(self, rows: int, cols: int) -> None:
        """Tells its terminal a new size."""
        self._link.send(FrameType.RESIZE, process=self.id, payload=encode_size(rows, cols))

    async def write_input(self, content: bytes) -> None:
        """Feeds stdin, waiting until the program runs and while it does not read."""
        await self.started.wait()
        at = 0
        while at < len(content) and not self.exited.done() and not self._closed.done():
            if self._input_credit == 0:
                self._granted.clear()
                await self._granted.wait()
                continue
            size = min(len(content) - at, self._input_credit, PAYLOAD_LIMIT)
            self._input_credit -= size
            piece = content[at : at + size]
            self._link.send(FrameType.DATA, stream=Stream.STDIN, process=self.id, payload=piece)
            at += size

    async def end_input(self) -> None:
        """Closes stdin after what was written."""
        await self.started.wait()
        self._link.send(FrameType.END, stream=Stream.STDIN, process=self.id)

    def accept(self, frame: Frame) -> None:
        """Handles one frame of this process; raises Rejected for a guest that breaks the rules."""
        stream = {Stream.STDOUT: self.stdout, Stream.STDERR: self.stderr}.get(Stream(frame.stream))
        if frame.type == FrameType.DATA and stream is not None:
            stream.accept(frame.payload)
        elif frame.type == FrameType.END and stream is not None:
            stream.end()
        elif frame.type == FrameType.LOST and stream is not None:
            if len(frame.payload) == _U64.size:
                stream.lost += _U64.unpack(frame.payload)[0]
        elif frame.type == FrameType.WINDOW and len(frame.payload) == _U32.size:
            granted = self._input_credit + _U32.unpack(frame.payload)[0]
            self._input_credit = min(granted, INPUT_WINDOW)
            self._granted.set()
        elif frame.type == FrameType.EXIT and not self.exited.done():
            values, texts = numbers(frame.payload), words(frame.payload)
            self.exited.set_result(
                ProcessExit(
                    code=values.get(Key.CODE, 255) & 0xFF,
                    signal=values.get(Key.SIGNAL, 0) & 0x7F,
                    problem=texts.get(Key.TEXT, "")[:1000],
                    read_bytes=values.get(Key.READ_BYTES, 0),
                    out_of_memory=values.get(Key.OOM_KILLS, 0) > 0,
                )
            )
            self.stdout.end()
            self.stderr.end()
            self._wake()

    def close(self) -> None:
        """The channel is gone: ends the streams and wakes who waits."""
        self.stdout.end()
        self.stderr.end()
        if not self._closed.done():
            self._closed.set_result(None)
        self._wake()

    def _wake(self) -> None:
        # A writer that waits for credit or for the start must find out that nobody listens.
        self.started.set()
        self._granted.set()
