"""Requests of one connection that wait for their device: a task each, answered when it is done.

InFlight owns the tasks; the Sender that it is given owns the answers.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nbdserver.commands import run_command
from nbdserver.counters import Counters
from nbdserver.device import Buffer, Device, DeviceError
from nbdserver.limits import Limits
from nbdserver.payloads import PayloadPool
from nbdserver.protocol.constants import Command, CommandFlag
from nbdserver.protocol.errors import EIO, wire_error
from nbdserver.protocol.replies import encode_error
from nbdserver.protocol.requests import Request
from nbdserver.protocol.session import Session
from nbdserver.readiness import Readiness
from nbdserver.sender import Sender

_log = logging.getLogger(__name__)

_CROWDED = 64
_BY_READING = frozenset((Command.READ, Command.BLOCK_STATUS, Command.CACHE))


@dataclass(slots=True)
class Turn:
    """Shared by the connections of a loop: who was served last, how many misses are waited for,
    and memory for large payloads.

    A connection lingers on its socket only when nobody else could be kept waiting, and takes large
    portions only where for a while nobody else was served: `crowded` counts down.
    """

    last: object | None = None
    crowded: int = 0
    waiting: int = 0
    payloads: PayloadPool = field(default_factory=PayloadPool)
    readiness: Readiness = field(default_factory=Readiness)

    def take(self, who: object) -> bool:
        """`who` is served now; whether it was the last one to be served, too."""
        if self.last is who:
            if self.crowded:
                self.crowded -= 1
            return True
        self.last = who
        self.crowded = _CROWDED
        return False


class InFlight:
    """The requests in flight. `on_answered` is called after each, `on_broken` when one failed
    in a way that no reply can tell.
    """

    def __init__(
        self,
        *,
        copies: bool,
        session: Session,
        device: Device,
        limits: Limits,
        counters: Counters,
        sender: Sender,
        turn: Turn,
        on_answered: Callable[[], None],
        on_broken: Callable[[], None],
    ) -> None:
        self._copies = copies
        self._session = session
        self._device = device
        self._limits = limits
        self._counters = counters
        self._sender = sender
        self._turn = turn
        self._on_answered = on_answered
        self._on_broken = on_broken
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[asyncio.Task[None], Request] = {}
        self._bytes = 0
        self._taken_back: list[Request] = []

    def __bool__(self) -> bool:
        return bool(self._tasks)

    @property
    def full(self) -> bool:
        """As much waits as the limits allow."""
        return (
            len(self._tasks) >= self._limits.inflight_requests
            or self._bytes >= self._limits.inflight_bytes
        )

    def cancel_reads(self) -> None:
        """Nobody waits for them any more; writes finish."""
        for task, request in self._tasks.items():
            if request.command in _BY_READING:
                task.cancel()

    def take_back_reads(self, into: list[Request]) -> None:
        """Stop reads that can be asked again; each that ends unanswered is put `into` the list."""
        self._taken_back = into
        for task, request in self._tasks.items():
            if request.command in _BY_READING and not request.payload:
                task.cancel()

    def start(self, request: Request, payload: Buffer) -> None:
        """Begin to serve a request; `payload` is its own memory, from the pool or not."""
        if request.command in (Command.READ, Command.WRITE):
            self._bytes += request.length
        self._turn.waiting += 1
        task = self._loop.create_task(self._serve(request, payload))
        self._tasks[task] = request
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        request = self._tasks.pop(task)
        self._turn.waiting -= 1
        if request.command in (Command.READ, Command.WRITE):
            self._bytes -= request.length
        if task.cancelled():
            self._taken_back.append(request)
        elif task.exception() is not None:
            name = self._session.export
            _log.error(
                "a request of %r failed oddly",
                name,
                exc_info=task.exception(),
                extra={"export": name},
            )
            self._on_broken()
        self._on_answered()

    async def _serve(self, request: Request, payload: Buffer) -> None:
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                if request.command == Command.READ:
                    self._sender.send_read(request, await self._read(request))
                    return
                if request.command == Command.WRITE:
                    self._counters.writes += 1
                else:
                    self._counters.other_requests += 1
                reply = await run_command(
                    self._device, self._session, request, payload, max_extents=self._limits.extents
                )
        except DeviceError as failure:
            # Its errno becomes the protocol's here, at the last hop.
            fast = request.command == Command.WRITE_ZEROES and bool(
                request.flags & CommandFlag.FAST_ZERO
            )
            self.fail(request, wire_error(failure.errno, fast_zero=fast), str(failure))
        except TimeoutError:
            self.fail(request, EIO, "the device did not answer in time")
        except Exception:
            # A device's bug is that request's error; the connection and its neighbours live on.
            name = self._session.export
            _log.exception("the device of export %r failed", name, extra={"export": name})
            self.fail(request, EIO, "internal error")
        else:
            if isinstance(payload, memoryview):
                # Only now: after a timeout a thread may still be reading it.
                self._turn.payloads.give_back(payload)
            self._sender.answer(reply)

    async def _read(self, request: Request) -> Sequence[Buffer]:
        buffers = await self._device.read(request.offset, request.length)
        if self._copies:
            buffers = (await self._device.read_copied(request.offset, request.length),)
        if sum(map(len, buffers)) != request.length:
            raise DeviceError(errno.EIO, "a read came back short")
        return buffers

    def fail(self, request: Request, error: int, message: str = "") -> None:
        """Answer with a protocol error value."""
        self._counters.errors += 1
        if error == EIO:  # others are the client's own; this one somebody has to look at
            name = self._session.export
            _log.warning("a request of %r failed: %s", name, message, extra={"export": name})
        mode = self._session.mode
        self._sender.answer(encode_error(mode, request.cookie, request.offset, error, message))
