"""One client in its transmission phase: requests in batches, answers from the map, misses as tasks.

A Connection owns its stream, its unanswered requests, and the pins of what it has not yet sent. A
read hit costs no task, future, lock or log line: what one `recv_into` brought is answered by one
`sendmsg`. The bytes of a device are never touched here.
"""

import asyncio
import errno
import logging
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbdserver.backlog import IOV_MAX, Backlog, Reply
from nbdserver.counters import Counters
from nbdserver.device import BaseDevice, Buffer, Device, DeviceError
from nbdserver.limits import Limits
from nbdserver.protocol.constants import Command, CommandFlag, ReplyMode
from nbdserver.protocol.errors import EINVAL, EIO, ESHUTDOWN, ProtocolViolation, wire_error
from nbdserver.protocol.replies import (
    clip_extents,
    encode_done,
    encode_error,
    encode_extents,
    encode_read_head,
)
from nbdserver.protocol.requests import (
    Request,
    RequestLayout,
    block_status_payload,
    check_request,
)
from nbdserver.protocol.session import Session
from nbdserver.streams import Stream

_log = logging.getLogger(__name__)

_BY_READING = frozenset((Command.READ, Command.BLOCK_STATUS, Command.CACHE))
_BIG_PAYLOAD = 256 << 10


@dataclass(slots=True)
class _Partial:
    """A request whose payload is still arriving, straight into place."""

    header: bytes
    request: Request
    view: memoryview
    filled: int


class Connection:
    """The transmission phase of one client. `start` it on its loop; `on_end` is called once.

    `scratch` is the receive buffer; connections of one loop share it, because between two calls a
    connection keeps only the tail of an incomplete request.
    """

    def __init__(
        self,
        *,
        stream: Stream,
        session: Session,
        device: Device,
        limits: Limits,
        counters: Counters,
        scratch: memoryview,
        on_end: Callable[["Connection"], None],
        rest: bytes = b"",
    ) -> None:
        self.session = session
        self.device = device
        self.stream = stream
        self._limits = limits
        self._counters = counters
        self._scratch = scratch
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._layout = RequestLayout(session)
        self._mode = session.mode
        # A stream that encrypts would touch mapped pages: its reads all take the copying path.
        self._try_read = _not_now if stream.copies else device.try_read
        self._observes = getattr(type(device), "observe", None) is not BaseDevice.observe
        self._cookie_at = 8
        self._iov: list[Buffer] = []
        self._plain: list[bytes] = []
        self._ranges: list[tuple[int, int, bool]] = []
        self._batch_bytes = 0
        self._backlog = Backlog()
        self._tail = rest
        self._partial: _Partial | None = None
        self._drain_left = 0
        self._tasks: dict[asyncio.Task[None], Request] = {}
        self._inflight_bytes = 0
        self._reading = False
        self._writing = False
        self._repairing: asyncio.Task[None] | None = None
        self._flush_soon = False
        self._finishing = False
        self._closed = False
        self._ended = False
        self._shutting_down = False
        self._held = False
        self._quiet: asyncio.Future[None] | None = None
        self._progress = 0
        self._stall_timer: asyncio.TimerHandle | None = None

    # --- life ---

    def start(self) -> None:
        """Begin to serve; what came with the handshake's last bytes is served first."""
        self._resume()

    def refuse_new_requests(self) -> None:
        """Answer ESHUTDOWN to every request from now on; those in flight are finished."""
        self._shutting_down = True

    def finish(self) -> None:
        """Take no more requests, answer those in flight, then close."""
        self._finishing = True
        self._stop_reading()
        self._flush()
        self._maybe_done()

    def abort(self) -> None:
        """Close now. Reads in flight are cancelled; writes finish, unanswered."""
        if self._closed:
            return
        self._closed = True
        self._stop_reading()
        self._stop_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._repairing is not None:
            self._repairing.cancel()
        self._backlog.clear()
        self._iov.clear()
        self._ranges.clear()
        self._plain.clear()
        for task, request in self._tasks.items():
            if request.command in _BY_READING:
                task.cancel()
        self._partial = None
        self.stream.close()
        self._maybe_done()

    @property
    def idle(self) -> bool:
        """Nothing in flight and nothing unsent."""
        return not (self._tasks or self._backlog or self._repairing or self.stream.unsent)

    async def hold(self) -> None:
        """Stop at a request boundary: read no more, and return when all in flight is answered."""
        self._held = True
        self._stop_reading()
        while not self.idle and not self._closed:
            if self._quiet is None:
                self._quiet = self._loop.create_future()
            await self._quiet

    def release_hold(self) -> None:
        """Go on after `hold`."""
        self._held = False
        if not self._closed:
            self._resume()

    def unparsed(self) -> bytes:
        """While held: bytes received and not yet answered, from a request's first byte on.

        Payload bytes that were to be skipped come back as a count in `skipping`.
        """
        if self._partial is not None:
            partial = self._partial
            return partial.header + bytes(partial.view[: partial.filled])
        return self._tail

    @property
    def skipping(self) -> int:
        """Payload bytes of a refused request that are still to come and will be dropped."""
        return self._drain_left

    def skip(self, count: int) -> None:
        """Before `start`: drop this many bytes first (taken over from another process)."""
        self._drain_left = count

    def detach(self) -> None:
        """While held: let go of the stream without closing it (another process has it now)."""
        self._closed = True
        self._stop_reading()
        self._stop_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self._maybe_done()

    def _maybe_done(self) -> None:
        if self._closed:
            if not self._tasks and not self._ended:
                self._ended = True
                self._on_end(self)
        elif self._finishing and self.idle:
            self.abort()
        if self._quiet is not None and (self._closed or self.idle):
            quiet, self._quiet = self._quiet, None
            quiet.set_result(None)

    # --- receiving ---

    def _resume(self) -> None:
        """Serve what is held back, then read on, unless something forbids it."""
        if self._closed or self._finishing or self._held or self._backlog:
            return
        if self._tail:
            # It may be larger than the scratch buffer when it came from a handshake or hand-over.
            tail, self._tail = self._tail, b""
            room = len(self._scratch)
            while tail:
                piece, tail = tail[:room], tail[room:]
                if self._partial is None:
                    piece = self._tail + piece
                    self._tail = b""
                    piece, tail = piece[:room], piece[room:] + tail
                    self._scratch[: len(piece)] = piece
                    self._process(len(piece))
                else:
                    tail = self._fill_partial(piece) + tail
                if not self._can_read():
                    self._tail += tail
                    return
        if not self._reading and self._can_read():
            self._reading = True
            self._loop.add_reader(self.stream.read_fd, self._readable)
            if self.stream.copies:
                # Decrypted bytes may wait inside the stream, where no selector sees them.
                self._loop.call_soon(self._readable)

    def _can_read(self) -> bool:
        return not (
            self._closed
            or self._finishing
            or self._held
            or self._backlog
            or self.stream.unsent
            or len(self._tasks) >= self._limits.inflight_requests
            or self._inflight_bytes >= self._limits.inflight_bytes
        )

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self.stream.read_fd)

    def _readable(self) -> None:
        # Twice: what arrives while a batch is answered is taken without a turn of the loop.
        for _ in range(2):
            if not self._can_read():
                self._stop_reading()
                return
            partial = self._partial
            tail = self._tail
            held = len(tail)
            try:
                if partial is not None:
                    count = self.stream.recv_into(partial.view[partial.filled :])
                elif held:
                    self._scratch[:held] = tail
                    count = self.stream.recv_into(self._scratch[held:])
                else:
                    count = self.stream.recv_into(self._scratch)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.abort()
                return
            if count == 0:
                self.finish()
                return
            self._counters.bytes_received += count
            if partial is not None:
                partial.filled += count
                self._complete_partial(partial)
            else:
                self._tail = b""
                self._process(held + count)
        if self.stream.copies and self._reading:
            self._loop.call_soon(self._readable)

    def _fill_partial(self, data: bytes) -> bytes:
        """Add to the payload that is arriving; what is left belongs to the next request."""
        partial = self._partial
        assert partial is not None
        used = min(len(partial.view) - partial.filled, len(data))
        partial.view[partial.filled : partial.filled + used] = data[:used]
        partial.filled += used
        self._complete_partial(partial)
        return data[used:]

    def _complete_partial(self, partial: _Partial) -> None:
        if partial.filled == len(partial.view):
            self._partial = None
            self._deliver(partial.request, partial.view, private=True)
            self._flush()

    def _process(self, end: int) -> None:
        """Answer the `end` bytes in the scratch buffer as far as they go; keep the tail."""
        view = self._scratch
        layout = self._layout
        head = layout.header_size
        room = self._limits.batch_bytes
        position = 0
        while True:
            if self._drain_left:
                skipped = min(self._drain_left, end - position)
                self._drain_left -= skipped
                position += skipped
            position, added = layout.gather_hits(
                view, position, end, self._try_read, self._iov, self._ranges, room
            )
            self._batch_bytes += added
            if end - position < head:
                break
            if len(self._iov) > 512 or self._batch_bytes >= room:
                self._flush()
                if not self._can_read():
                    break
                continue
            if not self._can_read():
                break
            position = self._take(view, position, end)
            if position < 0:
                return
        if position < end:
            self._tail = bytes(view[position:end])
        if self._iov or self._plain:
            self._flush()

    def _take(self, view: memoryview, position: int, end: int) -> int:
        """Start the request at `position`, which is no hit; the next position, or -1: no more."""
        try:
            request = self._layout.parse(view, position)
        except ProtocolViolation as violation:
            self._violated(str(violation))
            return -1
        header = position
        position += self._layout.header_size
        if request.command == Command.DISC:
            self.finish()
            return -1
        error = ESHUTDOWN if self._shutting_down else check_request(request, self.session)
        if request.payload:
            limit = self._payload_limit(request)
            if request.payload > limit:
                self._fail(request, error or EINVAL)
                self._counters.violations += 1
                self.finish()
                return -1
            available = min(request.payload, end - position)
            if error:
                self._fail(request, error)
                self._drain_left = request.payload - available
            elif available == request.payload:
                self._deliver(request, view[position : position + available], private=False)
            else:
                self._partial = _begin_partial(request, view[header:end], position - header)
                return end
            return position + available
        if error:
            self._fail(request, error)
        else:
            self._spawn(request, b"")
        return position

    def _payload_limit(self, request: Request) -> int:
        if request.command == Command.BLOCK_STATUS:
            return self._limits.option_bytes
        if self._mode is ReplyMode.EXTENDED:
            return self.session.maximum
        return self._limits.drained_payload_bytes

    def _violated(self, reason: str) -> None:
        self._counters.violations += 1
        _log.info("closing a client of %r: %s", self.session.export, reason)
        self._flush()
        self.abort()

    def _deliver(self, request: Request, payload: memoryview, *, private: bool) -> None:
        """A request with its whole payload; not `private`: in the scratch buffer, soon gone."""
        if request.command == Command.WRITE and not request.flags & CommandFlag.FUA:
            try:
                written = self.device.try_write(request.offset, payload)
            except DeviceError as failure:
                self._fail(request, wire_error(failure.errno), str(failure))
                return
            if written:
                self._counters.writes += 1
                self._answer(encode_done(self._mode, request.cookie, request.offset))
                return
        self._spawn(request, payload if private else bytes(payload))

    # --- requests that take time ---

    def _spawn(self, request: Request, payload: Buffer) -> None:
        if request.command in (Command.READ, Command.WRITE):
            self._inflight_bytes += request.length
        task = self._loop.create_task(self._serve(request, payload))
        self._tasks[task] = request
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        request = self._tasks.pop(task)
        if request.command in (Command.READ, Command.WRITE):
            self._inflight_bytes -= request.length
        if not task.cancelled() and task.exception() is not None:
            _log.error(
                "a request of %r failed oddly", self.session.export, exc_info=task.exception()
            )
            self.abort()
        if not self._reading and not self._flush_soon:
            self._resume()
        if self._finishing or self._closed or self._held:
            self._flush()
            self._maybe_done()

    async def _serve(self, request: Request, payload: Buffer) -> None:
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                if request.command == Command.READ:
                    self._send_read(request, await self._read(request))
                    return
                reply = await self._run(request, payload)
        except DeviceError as failure:
            reply = self._error(request, wire_error(failure.errno), str(failure))
        except TimeoutError:
            reply = self._error(request, EIO, "the device did not answer in time")
        except asyncio.CancelledError:
            raise
        except Exception:
            # A device's bug is that request's error; the connection and its neighbours live on.
            _log.exception("device of export %r failed", self.session.export)
            reply = self._error(request, EIO, "internal error")
        self._answer(reply)

    async def _read(self, request: Request) -> Sequence[Buffer]:
        buffers = await self.device.read(request.offset, request.length)
        if self.stream.copies:
            return (await self.device.read_copied(request.offset, request.length),)
        return buffers

    async def _run(self, request: Request, payload: Buffer) -> bytes:
        """Everything but reads; the encoded reply."""
        device, offset, length = self.device, request.offset, request.length
        fua = bool(request.flags & CommandFlag.FUA)
        command = request.command
        self._counters.other_requests += command != Command.WRITE
        if command == Command.WRITE:
            self._counters.writes += 1
            await device.write(offset, payload, fua=fua)
        elif command == Command.FLUSH:
            await device.flush()
        elif command == Command.TRIM:
            await device.trim(offset, length, fua=fua)
        elif command == Command.WRITE_ZEROES:
            await device.write_zeroes(
                offset,
                length,
                fua=fua,
                no_hole=bool(request.flags & CommandFlag.NO_HOLE),
                fast=bool(request.flags & CommandFlag.FAST_ZERO),
            )
        elif command == Command.CACHE:
            await device.cache(offset, length)
        else:
            return await self._block_status(request, payload)
        return encode_done(self._mode, request.cookie, offset)

    async def _block_status(self, request: Request, payload: Buffer) -> bytes:
        length, contexts = request.length, self.session.contexts
        if request.payload:
            asked = block_status_payload(request, bytes(payload), self.session)
            if asked is None:
                raise DeviceError(errno.EINVAL, "malformed block status payload")
            length, contexts = asked
        one = bool(request.flags & CommandFlag.REQ_ONE)
        statuses = []
        for number, name in contexts:
            extents = await self.device.extents(name, request.offset, length, one=one)
            clipped = clip_extents(
                extents, length, one=one, limit=self._limits.extents, mode=self._mode
            )
            statuses.append((number, clipped))
        return encode_extents(self._mode, request.cookie, request.offset, statuses)

    # --- answering ---

    def _error(self, request: Request, error: int, message: str = "") -> bytes:
        self._counters.errors += 1
        return encode_error(self._mode, request.cookie, request.offset, error, message)

    def _fail(self, request: Request, error: int, message: str = "") -> None:
        self._answer(self._error(request, error, message))

    def _answer(self, reply: bytes) -> None:
        """Queue a reply without data; those of one turn of the loop leave together."""
        if self._closed:
            return
        self._plain.append(reply)
        if not self._flush_soon:
            self._flush_soon = True
            self._loop.call_soon(self._flush_answers)

    def _flush_answers(self) -> None:
        self._flush_soon = False
        self._flush()
        self._resume()
        self._maybe_done()

    def _send_read(self, request: Request, buffers: Sequence[Buffer]) -> None:
        """Send a read's buffers before anything suspends, or pin what could not be sent."""
        if self._closed:
            return
        self._counters.misses += 1
        self._flush()
        head = encode_read_head(self._mode, request.cookie, request.offset, request.length)
        self._iov.append(head)
        self._iov += buffers
        self._ranges.append((request.offset, request.length, False))
        self._batch_bytes += len(head) + request.length
        self._flush()

    def _flush(self) -> None:
        """Send the batch: what the socket does not take now goes to the backlog, pinned."""
        iov, plain, ranges = self._iov, self._plain, self._ranges
        if not (iov or plain) or self._closed:
            return
        expected = self._batch_bytes
        out = iov
        acks = b""
        if plain:
            acks = plain[0] if len(plain) == 1 else b"".join(plain)
            out = [acks, *iov]
            expected += len(acks)
            plain.clear()
        sent = 0
        faulted = False
        if not self._backlog and not self.stream.unsent:
            try:
                sent = self.stream.sendmsg(out if len(out) <= IOV_MAX else out[:IOV_MAX])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as failure:
                if failure.errno != errno.EFAULT:
                    self.abort()
                    return
                faulted = True
        counters = self._counters
        counters.bytes_sent += sent
        if ranges:
            if ranges[0][2]:
                counters.hits += len(ranges)
            if self._observes:
                self.device.observe(ranges)
                self._ranges = []
        if sent != expected or self.stream.unsent:
            self._fall_behind(acks, iov, ranges, sent)
        iov.clear()
        self._ranges.clear()
        self._batch_bytes = 0
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
            self._backlog.add_reads(iov, ranges, sent, self.device.pin, cookie_at=self._cookie_at)
        if not self._writing and self._repairing is None:
            self._writing = True
            self._loop.add_writer(self.stream.write_fd, self._writable)
        if self._stall_timer is None:
            self._watch_for_stall()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self.stream.write_fd)

    def _writable(self) -> None:
        try:
            self.stream.flush()
            while self._backlog and not self.stream.unsent:
                sent = self.stream.sendmsg(self._backlog.parts(self._limits.batch_bytes))
                self._backlog.advance(sent)
                self._counters.bytes_sent += sent
                self._progress += 1
        except (BlockingIOError, InterruptedError):
            return
        except OSError as failure:
            if failure.errno == errno.EFAULT:
                self._repair()
            else:
                self.abort()
            return
        if not self.stream.unsent:
            self._stop_writing()
            self._caught_up()

    def _caught_up(self) -> None:
        self._resume()
        if self._reading:
            self._readable()
        self._maybe_done()

    def _watch_for_stall(self) -> None:
        """One timer per client that fell behind; it ends by itself when the client caught up."""
        before = self._progress

        def look() -> None:
            self._stall_timer = None
            if self._closed or not (self._backlog or self.stream.unsent):
                return
            if self._progress == before and self._repairing is None:
                self._counters.stalls += 1
                _log.info("closing a client of %r that reads no answers", self.session.export)
                self.abort()
            else:
                self._watch_for_stall()

        self._stall_timer = self._loop.call_later(self._limits.stalled_seconds, look)

    # --- after a fault in mapped memory ---

    def _repair(self) -> None:
        """The kernel could not read a mapped page: send private copies instead."""
        self._counters.faults += 1
        self._stop_writing()
        self._stop_reading()
        if self._repairing is None:
            self._repairing = self._loop.create_task(self._copy_backlog())
            self._repairing.add_done_callback(self._repaired)

    async def _copy_backlog(self) -> None:
        for reply in tuple(self._backlog.replies):
            if not reply.mapped:
                continue
            try:
                async with asyncio.timeout(self._limits.request_seconds):
                    copy = await self.device.read_copied(reply.offset, reply.length)
            except (DeviceError, TimeoutError) as failure:
                if reply.sent:
                    # The header promised data: only right bytes or a closed connection may follow.
                    self.abort()
                    return
                number = failure.errno if isinstance(failure, DeviceError) else errno.EIO
                self._replace_by_error(reply, wire_error(number or errno.EIO))
                continue
            reply.buffers = (copy,)
            reply.mapped = False
            reply.let_go()

    def _replace_by_error(self, reply: Reply, error: int) -> None:
        self._counters.errors += 1
        reply.head = encode_error(
            self._mode, reply.cookie, reply.offset, error, "the data could not be read"
        )
        reply.buffers, reply.length, reply.mapped = (), 0, False
        reply.let_go()

    def _repaired(self, task: asyncio.Task[None]) -> None:
        self._repairing = None
        if self._closed:
            self._maybe_done()
            return
        if task.cancelled() or task.exception() is not None:
            self.abort()
            return
        self._writing = True
        self._loop.add_writer(self.stream.write_fd, self._writable)


def _begin_partial(request: Request, received: memoryview, header: int) -> _Partial:
    # Anonymous memory is committed as it is filled: a client that announces much and sends little
    # costs little.
    size = request.payload
    view = memoryview(mmap.mmap(-1, size) if size > _BIG_PAYLOAD else bytearray(size))
    filled = len(received) - header
    view[:filled] = received[header:]
    return _Partial(bytes(received[:header]), request, view, filled)


def _not_now(offset: int, length: int) -> None:  # noqa: ARG001
    """A try_read that never succeeds."""
    return
