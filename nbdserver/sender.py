"""The sending half of a connection: batches, what did not fit, faults in mapped memory, stalls.

A Sender owns replies from the moment they are encoded until the kernel has them, and their pins.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence

from nbdserver.backlog import IOV_MAX, Backlog, Reply, first_bytes
from nbdserver.counters import Counters
from nbdserver.device import BaseDevice, Buffer, Device, DeviceError
from nbdserver.limits import Limits
from nbdserver.protocol.errors import wire_error
from nbdserver.protocol.replies import encode_error, encode_read_head
from nbdserver.protocol.requests import Request
from nbdserver.protocol.session import Session
from nbdserver.streams import Stream

_log = logging.getLogger(__name__)


class Sender:
    """Sends replies of one connection. `iov`, `ranges` and `size` are the batch being gathered.

    `on_room` is called when all that waited has left, `on_broken` when the stream is beyond use.
    """

    def __init__(
        self,
        *,
        stream: Stream,
        session: Session,
        device: Device,
        limits: Limits,
        counters: Counters,
        on_room: Callable[[], None],
        on_broken: Callable[[], None],
    ) -> None:
        self.iov: list[Buffer] = []
        self.ranges: list[tuple[int, int, bool]] = []
        self.size = 0
        self._plain: list[bytes] = []
        self._stream = stream
        self._session = session
        self._device = device
        self._limits = limits
        self._counters = counters
        self._on_room = on_room
        self._on_broken = on_broken
        self._loop = asyncio.get_running_loop()
        # The default observe() does nothing: then no batch is kept for it.
        self._observes = getattr(type(device), "observe", None) is not BaseDevice.observe
        self._backlog = Backlog()
        self._writing = False
        self._flush_soon = False
        self._repairing: asyncio.Task[None] | None = None
        self._closed = False
        self._progress = 0
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def behind(self) -> bool:
        """Something waits for the socket."""
        return bool(self._backlog.replies) or self._stream.unsent

    @property
    def idle(self) -> bool:
        """Nothing waits at all."""
        return not (self.behind or self._repairing or self._plain or self.iov)

    def answer(self, reply: bytes) -> None:
        """Queue a reply without data; those of one turn of the loop leave together."""
        if self._closed:
            return
        self._plain.append(reply)
        if not self._flush_soon:
            self._flush_soon = True
            self._loop.call_soon(self._flush_answers)

    def gather(self, replies: Sequence[bytes]) -> None:
        """Replies without data that leave with the next `flush`, which the caller owes."""
        if not self._closed:
            self._plain += replies

    def _flush_answers(self) -> None:
        self._flush_soon = False
        if not self._closed:
            self.flush()
            if not self.behind:
                self._on_room()

    def send_read(self, request: Request, buffers: Sequence[Buffer]) -> None:
        """Send a read's buffers before anything suspends, or pin what could not be sent."""
        if self._closed:
            return
        self._counters.misses += 1
        self.flush()
        head = encode_read_head(self._session.mode, request.cookie, request.offset, request.length)
        self.iov.append(head)
        self.iov += buffers
        self.ranges.append((request.offset, request.length, False))
        self.size += len(head) + request.length
        self.flush()

    def flush(self) -> None:
        """Send the batch: what the socket does not take now goes to the backlog, pinned."""
        iov, plain, ranges = self.iov, self._plain, self.ranges
        if not (iov or plain) or self._closed:
            return
        expected = self.size
        out = iov
        acks = b""
        if plain:
            acks = plain[0] if len(plain) == 1 else b"".join(plain)
            out = [acks, *iov]
            expected += len(acks)
            plain.clear()
        sent = 0
        faulted = False
        if not self._backlog.replies and not self._stream.unsent:
            room = self._limits.batch_bytes
            if expected > 2 * room:
                # One call sends on as long as the client reads on: here it has an end.
                out = first_bytes(out, room)
            try:
                sent = self._stream.sendmsg(out if len(out) <= IOV_MAX else out[:IOV_MAX])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as failure:
                if failure.errno != errno.EFAULT:
                    self._on_broken()
                    return
                faulted = True
        self._counters.bytes_sent += sent
        if ranges and ranges[0][2]:
            self._counters.hits += len(ranges)
        if sent != expected or self._stream.unsent:
            self._fall_behind(acks, iov, ranges, sent)
        if self._observes and ranges:
            self.ranges = []
            self._device.observe(ranges)
        else:
            ranges.clear()
        iov.clear()
        self.size = 0
        if faulted:
            self._repair()

    def _fall_behind(
        self,
        acks: bytes,
        iov: list[Buffer],
        ranges: list[tuple[int, int, bool]],
        sent: int,
    ) -> None:
        self._counters.partial_sends += 1
        if sent < len(acks):
            self._backlog.add_plain(acks[sent:])
            sent = 0
        else:
            sent -= len(acks)
        if ranges:
            self._backlog.add_reads(iov, ranges, sent, self._device.pin)
        if not self._writing and self._repairing is None:
            self._start_writing()
        if self._stall_timer is None:
            self._watch_for_stall()

    def _start_writing(self) -> None:
        self._writing = True
        self._loop.add_writer(self._stream.write_fd, self._writable)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._stream.write_fd)

    def _writable(self) -> None:
        try:
            self._stream.flush()
            if self._backlog.replies and not self._stream.unsent:
                # Once: a client that reads quickly does not keep the others waiting.
                sent = self._stream.sendmsg(self._backlog.parts(self._limits.batch_bytes))
                self._backlog.advance(sent)
                self._counters.bytes_sent += sent
                self._progress += 1
        except (BlockingIOError, InterruptedError):
            return
        except OSError as failure:
            if failure.errno == errno.EFAULT:
                self._repair()
            else:
                self._on_broken()
            return
        if not self.behind:
            self._stop_writing()
            self._on_room()

    def _watch_for_stall(self) -> None:
        """One timer per client that fell behind; it ends by itself when the client caught up."""
        before = self._progress

        def look() -> None:
            self._stall_timer = None
            if self._closed or not self.behind:
                return
            if self._progress == before and self._repairing is None:
                self._counters.stalls += 1
                name = self._session.export
                _log.info(
                    "closing a client of %r: it reads no answers", name, extra={"export": name}
                )
                self._on_broken()
            else:
                self._watch_for_stall()

        self._stall_timer = self._loop.call_later(self._limits.stalled_seconds, look)

    # --- after a fault in mapped memory ---

    def _repair(self) -> None:
        """The kernel could not read a mapped page: send private copies instead."""
        self._counters.faults += 1
        self._stop_writing()
        if self._repairing is None:
            self._repairing = self._loop.create_task(self._copy_backlog())
            self._repairing.add_done_callback(self._repaired)

    async def _copy_backlog(self) -> None:
        for reply in tuple(self._backlog.replies):
            if not reply.mapped:
                continue
            try:
                async with asyncio.timeout(self._limits.request_seconds):
                    copy = await self._device.read_copied(reply.offset, reply.length)
                if len(copy) != reply.length:
                    raise DeviceError(errno.EIO, "a copy came back short")
            except (DeviceError, TimeoutError) as failure:
                if reply.sent:
                    # The header promised data: only right bytes or a closed connection may follow.
                    self._on_broken()
                    return
                number = failure.errno if isinstance(failure, DeviceError) else errno.EIO
                self._replace_by_error(reply, wire_error(number or errno.EIO))
                continue
            reply.buffers = (copy,)
            reply.mapped = False
            reply.let_go()

    def _replace_by_error(self, reply: Reply, error: int) -> None:
        self._counters.errors += 1
        mode = self._session.mode
        # In all three framings the cookie follows the first eight bytes.
        cookie = reply.head[8:16]
        reply.head = encode_error(mode, cookie, reply.offset, error, "the data could not be read")
        reply.buffers, reply.length, reply.mapped = (), 0, False
        reply.let_go()

    def _repaired(self, task: asyncio.Task[None]) -> None:
        self._repairing = None
        if self._closed:
            return
        if task.cancelled() or task.exception() is not None:
            name = self._session.export
            _log.error("copying after a fault failed: %r", name, extra={"export": name})
            self._on_broken()
            return
        self._start_writing()

    def close(self) -> None:
        """Drop everything and release every pin; the stream is the connection's to close."""
        self._closed = True
        self._stop_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._repairing is not None:
            self._repairing.cancel()
        self._backlog.clear()
        self.iov.clear()
        self.ranges.clear()
        self._plain.clear()
