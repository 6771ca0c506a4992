"""The host's end of a machine's channel: processes, their streams, and the timeline.

One task reads frames and hands them out; every stream has a window, so a reader that is slow holds
back its own stream only. The guest is not trusted: it cannot make the host keep more than the
windows it was granted.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from cube.frames import (
    INPUT_WINDOW,
    OUTPUT_WINDOW,
    PAYLOAD_LIMIT,
    PROTOCOL_VERSION,
    Decoder,
    Frame,
    FrameType,
    Key,
    Stream,
    encode,
)
from cube.records import number, numbers, printable, words
from imagecache.errors import Rejected

_READ_BYTES: Final = 256 * 1024
_LOG_LINES: Final = 200
_MARKS: Final = 1000
_U32: Final = struct.Struct("<I")
_SIGNAL: Final = struct.Struct("<II")
_TO_GROUP: Final = 1


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of the timeline: seconds on the host's monotonic clock, process 0 = the guest."""

    name: str
    at: float
    process: int = 0


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a process ended: `code` as a shell would say it (128 + signal); `problem` is set when
    it could not be started; `read_bytes` of its root disk.
    """

    code: int
    signal: int = 0
    problem: str = ""
    read_bytes: int = 0


class OutputStream:
    """Bytes a guest process wrote. One reader at a time."""

    def __init__(self, link: GuestLink, process: int, stream: Stream) -> None:
        self._link = link
        self._process = process
        self._stream = stream
        self._kept: deque[bytes] = deque()
        self._credit = OUTPUT_WINDOW
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
        self._credit += len(taken)
        self._link.send(
            FrameType.WINDOW,
            stream=self._stream,
            process=self._process,
            payload=_U32.pack(len(taken)),
        )
        return taken

    def accept(self, received: bytes) -> None:
        """Keeps bytes from the guest; raises Rejected when it overruns its window."""
        if len(received) > self._credit:
            raise Rejected("the guest sent more output than it was allowed to")
        self._credit -= len(received)
        if received and not self._ended:
            self._kept.append(received)
            self._changed.set()

    def end(self) -> None:
        """No more bytes will come."""
        self._ended = True
        self._changed.set()


class GuestProcess:
    """A process in the guest, known by its container's id."""

    def __init__(self, link: GuestLink, identity: int) -> None:
        self.id = identity
        self.stdout = OutputStream(link, identity, Stream.STDOUT)
        self.stderr = OutputStream(link, identity, Stream.STDERR)
        self.exited: asyncio.Future[ProcessExit] = asyncio.get_running_loop().create_future()
        # The guest knows the process from here on; frames for it that come earlier are ignored.
        self.started = asyncio.Event()
        self._link = link
        self._input_credit = INPUT_WINDOW
        self._granted = asyncio.Event()

    def signal(self, number_: int, *, group: bool) -> None:
        """Sends a signal to the program, or to its whole process group."""
        payload = _SIGNAL.pack(number_, _TO_GROUP if group else 0)
        self._link.send(FrameType.SIGNAL, process=self.id, payload=payload)

    async def write_input(self, content: bytes) -> None:
        """Feeds stdin, waiting until the program runs and while it does not read."""
        await self.started.wait()
        at = 0
        while at < len(content):
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
        elif frame.type == FrameType.WINDOW and len(frame.payload) == _U32.size:
            self._input_credit += min(_U32.unpack(frame.payload)[0], INPUT_WINDOW)
            self._granted.set()
        elif frame.type == FrameType.EXIT and not self.exited.done():
            values, texts = numbers(frame.payload), words(frame.payload)
            self.exited.set_result(
                ProcessExit(
                    code=values.get(Key.CODE, 255) & 0xFF,
                    signal=values.get(Key.SIGNAL, 0) & 0x7F,
                    problem=texts.get(Key.TEXT, ""),
                    read_bytes=values.get(Key.READ_BYTES, 0),
                )
            )

    def close(self) -> None:
        """The channel is gone: ends the streams."""
        self.stdout.end()
        self.stderr.end()
        self.started.set()
        self._input_credit = 1 << 62  # a writer that waits must find out that nobody listens
        self._granted.set()


class GuestLink:
    """The channel to one machine's agent. Its owner runs `serve` as a task until the end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[None] = loop.create_future()
        self.processes: dict[int, GuestProcess] = {}
        self.marks: deque[Mark] = deque(maxlen=_MARKS)
        self.log: deque[str] = deque(maxlen=_LOG_LINES)
        self._spoken: set[int] = set()  # processes that have written something
        self.failure = ""  # why the agent gave up, once it has

    def add_process(self, identity: int) -> GuestProcess:
        """Expects frames of this process; others are ignored."""
        process = GuestProcess(self, identity)
        self.processes[identity] = process
        return process

    def send(
        self, kind: FrameType, *, stream: int = 0, process: int = 0, payload: bytes = b""
    ) -> None:
        """Queues a frame; control frames are small and streams have windows, so it stays small."""
        if not self._writer.is_closing():
            self._writer.write(encode(kind, stream=stream, process=process, payload=payload))

    async def serve(self) -> None:
        """Reads frames until the channel closes; raises Rejected for a guest that breaks them."""
        decoder = Decoder()
        try:
            while received := await self._read():
                arrived = time.monotonic()
                for frame in decoder.feed(received):
                    self._accept(frame, arrived)
        finally:
            for process in self.processes.values():
                process.close()

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(_READ_BYTES)
        except OSError:
            return b""  # a killed machine resets its socket; its exit status tells the story

    def _accept(self, frame: Frame, arrived: float) -> None:
        if frame.type == FrameType.HELLO:
            self._greet(frame, arrived)
        elif frame.type == FrameType.EVENT:
            name = words(frame.payload).get(Key.NAME, "")[:64]
            self._mark(name, frame, arrived)
            if name == "exec" and frame.process in self.processes:
                self.processes[frame.process].started.set()
        elif frame.type == FrameType.LOG:
            self.log.append(printable(frame.payload)[:1000])
        elif frame.type == FrameType.FAILED:
            self.failure = words(frame.payload).get(Key.TEXT, "no reason given")[:1000]
            self.send(FrameType.SHUTDOWN)
        elif frame.process in self.processes and frame.stream in tuple(Stream):
            if frame.type == FrameType.DATA and frame.process not in self._spoken:
                self._spoken.add(frame.process)
                self.marks.append(Mark("first-output", arrived, frame.process))
            if frame.type == FrameType.EXIT:
                self._mark("exit", frame, arrived)
            self.processes[frame.process].accept(frame)

    def _greet(self, frame: Frame, arrived: float) -> None:
        version = numbers(frame.payload).get(Key.VERSION)
        if version != PROTOCOL_VERSION:
            raise Rejected(
                f"the guest's agent speaks protocol {version}, not {PROTOCOL_VERSION}",
                remedy="make the initramfs anew: tools/guest-kernel --refresh",
            )
        self._mark("init", frame, arrived)
        # The guest's clock starts at the host's, corrected once at this point.
        payload = number(Key.VERSION, PROTOCOL_VERSION) + number(Key.REALTIME, time.time_ns())
        self.send(FrameType.HELLO, payload=payload)
        if not self.greeted.done():
            self.greeted.set_result(None)

    def _mark(self, name: str, frame: Frame, arrived: float) -> None:
        """Guest clocks start late: what counts is how long before its sending a thing happened."""
        values = numbers(frame.payload)
        waited = values.get(Key.SENT, 0) - values.get(Key.AT, 0)
        ago = waited / 1e9 if 0 < waited < 3600 * 10**9 else 0.0
        self.marks.append(Mark(name, arrived - ago, frame.process))
