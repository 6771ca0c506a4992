"""The host's end of a machine's channel: processes, their streams, and the timeline.

One task reads frames and hands them out; every stream has a window, so a reader that is slow holds
back its own stream only. The guest is not trusted: it cannot make the host keep more than the
windows it was granted, nor more unsent bytes than `_UNSENT_BYTES`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, TypeVar

from cube.channel.messages import (
    LOCALHOST,
    ExecSpec,
    GuestStats,
    decode_stats,
    encode_connect,
    encode_exec,
)
from cube.channel.process import GuestProcess, OutputStream, ProcessExit
from cube.frames import PROTOCOL_VERSION, Decoder, Frame, FrameType, Key, Stream, encode
from cube.records import number, numbers, printable, words
from imagecache.errors import LimitExceeded, Rejected, Unavailable, UsageError

__all__ = ["ExecSpec", "GuestLink", "GuestProcess", "Mark", "OutputStream", "ProcessExit"]

FIRST_OWN_ID: Final = 0x10000  # ids below are containers', from here on of what the host starts
OWN_PROCESSES: Final = 64  # execs and connections at a time, which the guest holds to as well
ANSWER_SECONDS: Final = 30.0
_CONTAINERS: Final = 32
_READ_BYTES: Final = 256 * 1024
_LOG_LINES: Final = 200
_MARKS: Final = 1000
_UNSENT_BYTES: Final = 16 * 1024 * 1024
_NONCE_BYTES: Final = 32
_QUESTIONS: Final = 16
_STALE_BYTES: Final = 64 * 1024 * 1024  # of an earlier host's conversation, dropped on adoption


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of the timeline: seconds on the host's monotonic clock, process 0 = the guest."""

    name: str
    at: float
    process: int = 0


_T = TypeVar("_T")


class GuestLink:
    """The channel to one machine's agent. Its owner runs `serve` as a task until the end.

    `sync_key` takes the channel over from an earlier host: `greeted` then waits until the guest has
    told about its containers, which are in `processes` if they have been started.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        sync_key: bytes = b"",
    ) -> None:
        self._reader = reader
        self._writer = writer
        loop = asyncio.get_running_loop()
        self.greeted: asyncio.Future[None] = loop.create_future()
        self.processes: dict[int, GuestProcess] = {}
        self.marks: deque[Mark] = deque(maxlen=_MARKS)
        self.log: deque[str] = deque(maxlen=_LOG_LINES)
        self._spoken: set[int] = set()  # processes that have written something
        self.failure = ""  # why the agent gave up, once it has
        self._sync_key = sync_key
        self._next_id = FIRST_OWN_ID
        self._stats: deque[asyncio.Future[GuestStats]] = deque()
        self._pings: dict[bytes, asyncio.Future[None]] = {}
        self._closed = False

    @property
    def states(self) -> dict[int, GuestProcess]:
        """The containers that the guest has, or had, a process of."""
        return {key: value for key, value in self.processes.items() if key < FIRST_OWN_ID}

    def add_process(self, identity: int) -> GuestProcess:
        """Expects frames of this process; others are ignored."""
        process = GuestProcess(self, identity)
        if self._closed:
            process.close()
        self._spoken.discard(identity)
        self.processes[identity] = process
        return process

    def start(self, container: int) -> GuestProcess:
        """Starts a container that was never started, or is over: with new streams and a new end.

        Raises UsageError for one that runs.
        """
        known = self.processes.get(container)
        runs = known is not None and known.started.is_set() and not known.exited.done()
        if runs and not self._closed:
            raise UsageError(f"container {container} runs already", remedy="end it first")
        process = self.add_process(container)
        self.send(FrameType.START, process=container)
        return process

    def execute(self, spec: ExecSpec) -> GuestProcess:
        """Runs a program in a running container; `forget` it afterwards.

        Raises UsageError, and LimitExceeded also for more than OWN_PROCESSES at a time.
        """
        payload = encode_exec(spec)
        return self._own(FrameType.EXEC, payload)

    def connect(self, port: int, address: str = LOCALHOST) -> GuestProcess:
        """A TCP connection inside the guest; refused, it exits with 111. `forget` it afterwards.

        Raises UsageError, LimitExceeded.
        """
        return self._own(FrameType.CONNECT, encode_connect(port, address))

    def forget(self, process: GuestProcess) -> None:
        """Frees what `execute` or `connect` gave; one that still runs is killed."""
        if not process.exited.done():
            process.signal(9, group=True)
        if self.processes.get(process.id) is process:
            del self.processes[process.id]
        self._spoken.discard(process.id)

    async def stats(self, *, seconds: float = ANSWER_SECONDS) -> GuestStats:
        """What machine and containers use now; raises Unavailable."""
        answer: asyncio.Future[GuestStats] = asyncio.get_running_loop().create_future()
        if len(self._stats) >= _QUESTIONS:
            raise Unavailable("the machine's agent has not answered earlier questions")
        self._stats.append(answer)
        self.send(FrameType.STATS)
        return await self._answered(answer, seconds)

    async def ping(self, *, seconds: float = ANSWER_SECONDS) -> None:
        """Returns when the agent has answered; raises Unavailable."""
        token = secrets.token_bytes(8)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pings[token] = answer
        try:
            self.send(FrameType.PING, payload=token)
            await self._answered(answer, seconds)
        finally:
            del self._pings[token]

    def send(
        self, kind: FrameType, *, stream: int = 0, process: int = 0, payload: bytes = b""
    ) -> None:
        """Queues a frame. Control frames are small and streams have windows, so little waits; a
        guest that reads nothing at all loses its channel.
        """
        if self._writer.is_closing():
            return
        self._writer.write(encode(kind, stream=stream, process=process, payload=payload))
        if self._writer.transport.get_write_buffer_size() > _UNSENT_BYTES:
            self._writer.transport.abort()

    async def serve(self) -> None:
        """Reads frames until the channel closes; raises Rejected for a guest that breaks them."""
        decoder = Decoder()
        try:
            received = await (self._synchronise() if self._sync_key else self._read())
            while received:
                arrived = time.monotonic()
                for frame in decoder.feed(received):
                    self._accept(frame, arrived)
                received = await self._read()
        finally:
            self._closed = True
            for process in self.processes.values():
                process.close()
            for answer in self._stats:
                answer.cancel()
            for pong in self._pings.values():
                pong.cancel()

    async def _synchronise(self) -> bytes:
        """Drops what an earlier host left of the conversation; the first bytes after the mark."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._writer.write(self._sync_key + nonce)
        dropped, tail = 0, b""
        while received := await self._read():
            tail += received
            at = tail.find(nonce)
            if at >= 0:
                return tail[at + _NONCE_BYTES :] or await self._read()
            dropped += len(received)
            if dropped > _STALE_BYTES:
                raise Rejected("the guest does not answer a new host's greeting")
            tail = tail[-_NONCE_BYTES + 1 :]
        return b""

    def _own(self, kind: FrameType, payload: bytes) -> GuestProcess:
        if len(self.processes) - len(self.states) >= OWN_PROCESSES:
            raise LimitExceeded(
                f"a machine runs at most {OWN_PROCESSES} execs and forwarded connections at a time"
            )
        while self._next_id in self.processes or self._next_id < FIRST_OWN_ID:
            self._next_id = (self._next_id + 1) & 0xFFFFFFFF
        process = self.add_process(self._next_id)
        self._next_id = (self._next_id + 1) & 0xFFFFFFFF
        self.send(kind, process=process.id, payload=payload)
        return process

    async def _answered(self, answer: asyncio.Future[_T], seconds: float) -> _T:
        if not self._closed:
            await asyncio.wait({answer}, timeout=seconds)
        if answer.done() and not answer.cancelled():
            return answer.result()
        raise Unavailable(
            "the machine's channel closed"
            if self._closed
            else f"the machine's agent did not answer within {seconds:g} seconds"
        )

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
            self._on_event(name, frame.process)
        elif frame.type == FrameType.LOG:
            self.log.append(printable(frame.payload[:1000])[:1000])
        elif frame.type == FrameType.STATS:
            self._on_stats(frame)
        elif frame.type == FrameType.PING:
            waiting = self._pings.get(frame.payload)
            if waiting is not None and not waiting.done():
                waiting.set_result(None)
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

    def _on_event(self, name: str, process: int) -> None:
        adopting = bool(self._sync_key) and not self.greeted.done()
        known = process in self.processes
        if adopting and name == "known" and 0 < process < FIRST_OWN_ID and not known:
            if len(self.processes) >= _CONTAINERS:
                raise Rejected("the guest names more containers than it can have")
            self.add_process(process)
        elif name == "exec" and known:
            self.processes[process].started.set()
        elif adopting and name == "adopted":
            self.greeted.set_result(None)

    def _on_stats(self, frame: Frame) -> None:
        stats = decode_stats(frame.payload)
        if self._stats:  # answers come in the order of the questions
            answer = self._stats.popleft()
            if not answer.done():
                answer.set_result(stats)

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
        if not self.greeted.done() and not self._sync_key:
            self.greeted.set_result(None)

    def _mark(self, name: str, frame: Frame, arrived: float) -> None:
        """Guest clocks start late: what counts is how long before its sending a thing happened."""
        values = numbers(frame.payload)
        waited = values.get(Key.SENT, 0) - values.get(Key.AT, 0)
        ago = waited / 1e9 if 0 < waited < 3600 * 10**9 else 0.0
        self.marks.append(Mark(name, arrived - ago, frame.process))
