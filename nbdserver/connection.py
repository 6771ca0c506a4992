"""One client in its transmission phase: requests in batches, answers from the map, misses as tasks.

A Connection owns its stream and its unanswered requests; its Sender owns answers. A read hit costs
no task, future, lock or log line: what one `recv_into` brought is answered by one `sendmsg`. The
bytes of a device are never touched here.
"""

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import sched_yield
from time import perf_counter

from nbdserver.commands import run_command
from nbdserver.counters import Counters
from nbdserver.device import Buffer, Device, DeviceError
from nbdserver.limits import Limits
from nbdserver.payloads import PayloadPool
from nbdserver.protocol.constants import Command, CommandFlag, ReplyMode
from nbdserver.protocol.errors import EINVAL, EIO, ESHUTDOWN, ProtocolViolation, wire_error
from nbdserver.protocol.replies import encode_done, encode_error
from nbdserver.protocol.requests import Request, RequestLayout, check_request
from nbdserver.protocol.session import Session
from nbdserver.sender import Sender
from nbdserver.streams import Stream

_log = logging.getLogger(__name__)

_BY_READING = frozenset((Command.READ, Command.BLOCK_STATUS, Command.CACHE))
_MOST_PATIENCE = 8
_LEAST_PATIENCE = 64


@dataclass(slots=True)
class Turn:
    """Shared by the connections of a loop: who was served last, how many misses are waited for,
    and memory for large payloads.

    A connection lingers on its socket only when nobody else could be kept waiting.
    """

    last: "Connection | None" = None
    waiting: int = 0
    payloads: PayloadPool = field(default_factory=PayloadPool)


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
        turn: Turn,
        on_end: Callable[["Connection"], None],
        rest: bytes = b"",
        skip: int = 0,
    ) -> None:
        self.session = session
        self.device = device
        self.stream = stream
        self._limits = limits
        self._counters = counters
        self._scratch = scratch
        self._turn = turn
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._layout = RequestLayout(session)
        self._sender = Sender(
            stream=stream,
            session=session,
            device=device,
            limits=limits,
            counters=counters,
            on_room=self._room_again,
            on_broken=self.abort,
        )
        # A stream that encrypts would touch mapped pages: its reads all take the copying path.
        self._try_read = _not_now if stream.copies else device.try_read
        self._try_write = device.try_write
        self._tail = rest
        self._partial: _Partial | None = None
        self._skip = skip
        self._tasks: dict[asyncio.Task[None], Request] = {}
        self._inflight_bytes = 0
        self._reading = False
        self._patience = _MOST_PATIENCE
        self._finishing = False
        self._closed = False
        self._ended = False
        self._shutting_down = False
        self._held = False
        self._quiet: asyncio.Future[None] | None = None

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
        self._sender.flush()
        self._maybe_done()

    def abort(self) -> None:
        """Close now. Reads in flight are cancelled; writes finish, unanswered."""
        if self._closed:
            return
        self._closed = True
        self._stop_reading()
        self._sender.close()
        for task, request in self._tasks.items():
            if request.command in _BY_READING:
                task.cancel()
        self._partial = None
        self.stream.close()
        self._maybe_done()

    async def hold(self) -> None:
        """Stop at a request boundary: read no more, return when all in flight is answered."""
        self._held = True
        self._stop_reading()
        while not self._idle and not self._closed:
            if self._quiet is None:
                self._quiet = self._loop.create_future()
            await self._quiet

    def release_hold(self) -> None:
        """Go on after `hold`."""
        self._held = False
        self._resume()

    @property
    def closed(self) -> bool:
        """The stream is closed or detached."""
        return self._closed

    def unparsed(self) -> bytes:
        """While held: bytes received and not answered, from a request's first byte on."""
        if self._partial is not None:
            partial = self._partial
            return partial.header + bytes(partial.view[: partial.filled])
        return self._tail

    @property
    def skipping(self) -> int:
        """Payload bytes of a refused request that are still to come and will be dropped."""
        return self._skip

    def detach(self) -> None:
        """While held: let go of the stream without closing it (another process has it now)."""
        self._closed = True
        self._sender.close()
        self._maybe_done()

    @property
    def _idle(self) -> bool:
        return not self._tasks and self._sender.idle

    def _maybe_done(self) -> None:
        if self._closed:
            if not self._tasks and not self._ended:
                self._ended = True
                if self._turn.last is self:
                    self._turn.last = None
                self._on_end(self)
        elif self._finishing and self._idle:
            self.abort()
        if self._quiet is not None and (self._closed or self._idle):
            quiet, self._quiet = self._quiet, None
            quiet.set_result(None)

    # --- receiving ---

    def _room_again(self) -> None:
        self._resume()
        self._maybe_done()

    def _resume(self) -> None:
        """Serve what is held back, then read on, unless something forbids it."""
        if self._reading or not self._can_read():
            return
        tail, self._tail = self._tail, b""
        while tail:
            # A tail from a handshake or a hand-over may be larger than the scratch buffer.
            if self._partial is not None:
                tail = self._fill_partial(self._partial, tail)
            else:
                piece, tail = tail[: len(self._scratch)], tail[len(self._scratch) :]
                self._scratch[: len(piece)] = piece
                self._process(len(piece))
            stuck = not tail or not self._can_read()
            if self._tail and self._partial is None:
                tail, self._tail = self._tail + tail, b""
            if stuck:
                self._tail = tail
                break
        if self._can_read():
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
            or self._sender.behind
            or len(self._tasks) >= self._limits.inflight_requests
            or self._inflight_bytes >= self._limits.inflight_bytes
        )

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self.stream.read_fd)

    def _readable(self) -> None:
        turn = self._turn
        alone = turn.last is self
        turn.last = self
        # Again: what arrives while a batch is answered is taken without a turn of the loop.
        for _ in range(4):
            if not self._can_read():
                self._stop_reading()
                return
            try:
                count = self._receive()
            except (BlockingIOError, InterruptedError):
                if not alone or turn.waiting:
                    return
                count = self._linger()
                if count < 0:
                    return
            except OSError:
                self.abort()
                return
            if count == 0:
                self.finish()
                return
            self._counters.bytes_received += count
            partial = self._partial
            if partial is not None:
                partial.filled += count
                self._complete_partial(partial)
            else:
                held, self._tail = len(self._tail), b""
                self._process(held + count)
        if self.stream.copies and self._reading:
            self._loop.call_soon(self._readable)

    def _receive(self) -> int:
        partial = self._partial
        if partial is not None:
            return self.stream.recv_into(partial.view[partial.filled :])
        held = len(self._tail)
        if held:
            self._scratch[:held] = self._tail
            return self.stream.recv_into(self._scratch[held:])
        return self.stream.recv_into(self._scratch)

    def _linger(self) -> int:
        """Ask the socket again for some microseconds: a quick client is faster than a wake-up.

        Answers the bytes received, or -1: nothing came, or the socket broke.
        """
        if self._patience <= 0:
            # It did not pay lately; now and then it is tried again.
            self._patience -= 1
            if self._patience > -_LEAST_PATIENCE:
                return -1
            self._patience = 1
        until = perf_counter() + self._limits.linger_seconds
        while perf_counter() < until:
            try:
                count = self._receive()
            except (BlockingIOError, InterruptedError):
                # On a busy host the client may be waiting for this very processor.
                sched_yield()
                continue
            except OSError:
                break
            self._patience = min(max(self._patience, 0) + 2, _MOST_PATIENCE)
            return count
        self._patience -= 1
        return -1

    def _begin_partial(self, request: Request, received: memoryview, header: int) -> None:
        view = self._turn.payloads.take(request.payload)
        filled = len(received) - header
        view[:filled] = received[header:]
        self._partial = _Partial(bytes(received[:header]), request, view, filled)

    def _fill_partial(self, partial: _Partial, data: bytes) -> bytes:
        """Add to the payload that is arriving; what is left belongs to the next request."""
        used = min(len(partial.view) - partial.filled, len(data))
        partial.view[partial.filled : partial.filled + used] = data[:used]
        partial.filled += used
        self._complete_partial(partial)
        return data[used:]

    def _complete_partial(self, partial: _Partial) -> None:
        if partial.filled == len(partial.view):
            self._partial = None
            self._deliver(partial.request, partial.view, private=True)
            self._sender.flush()

    def _process(self, end: int) -> None:
        """Answer the `end` bytes in the scratch buffer as far as they go; keep the tail."""
        view, layout, sender = self._scratch, self._layout, self._sender
        head = layout.header_size
        room = self._limits.batch_bytes
        position = 0
        while True:
            if self._skip:
                skipped = min(self._skip, end - position)
                self._skip -= skipped
                position += skipped
            if not self._shutting_down:
                position, added = layout.gather_hits(
                    view, position, end, self._try_read, sender.iov, sender.ranges, room
                )
                sender.size += added
                position = self._take_writes(view, position, end)
            if end - position < head:
                break
            if len(sender.iov) > 512 or sender.size >= room:
                sender.flush()
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
        sender.flush()

    def _take_writes(self, view: memoryview, position: int, end: int) -> int:
        """Plain writes that are here whole and that the device takes at once; the next position."""
        plain, try_write, head = self._layout.plain_write, self._try_write, self._layout.header_size
        mode = self.session.mode
        acks: list[bytes] = []
        while (found := plain(view, position, end)) is not None:
            cookie, offset, length = found
            body = position + head
            try:
                if not try_write(offset, view[body : body + length]):
                    break
            except DeviceError:
                break  # It is asked again where errors are answered.
            position = body + length
            acks.append(encode_done(mode, cookie, offset))
        if acks:
            self._counters.writes += len(acks)
            self._sender.gather(acks)
        return position

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
            if request.payload > self._payload_limit(request):
                self._counters.violations += 1
                self._fail(request, error or EINVAL)
                self.finish()
                return -1
            available = min(request.payload, end - position)
            if error:
                self._fail(request, error)
                self._skip = request.payload - available
            elif available == request.payload:
                self._deliver(request, view[position : position + available], private=False)
            else:
                self._begin_partial(request, view[header:end], position - header)
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
        if self.session.mode is ReplyMode.EXTENDED:
            return self.session.maximum
        return self._limits.drained_payload_bytes

    def _violated(self, reason: str) -> None:
        self._counters.violations += 1
        _log.info("closing a client of %r: %s", self.session.export, reason)
        self._sender.flush()
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
                if private:
                    self._turn.payloads.give_back(payload)
                self._counters.writes += 1
                reply = encode_done(self.session.mode, request.cookie, request.offset)
                self._sender.answer(reply)
                return
        self._spawn(request, payload if private else bytes(payload))

    # --- requests that take time ---

    def _spawn(self, request: Request, payload: Buffer) -> None:
        if request.command in (Command.READ, Command.WRITE):
            self._inflight_bytes += request.length
        self._turn.waiting += 1
        task = self._loop.create_task(self._serve(request, payload))
        self._tasks[task] = request
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        request = self._tasks.pop(task)
        self._turn.waiting -= 1
        if request.command in (Command.READ, Command.WRITE):
            self._inflight_bytes -= request.length
        if not task.cancelled() and task.exception() is not None:
            _log.error(
                "a request of %r failed oddly", self.session.export, exc_info=task.exception()
            )
            self.abort()
        self._room_again()

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
                    self.device, self.session, request, payload, max_extents=self._limits.extents
                )
        except DeviceError as failure:
            # Its errno becomes the protocol's here, at the last hop.
            fast = request.command == Command.WRITE_ZEROES and bool(
                request.flags & CommandFlag.FAST_ZERO
            )
            self._fail(request, wire_error(failure.errno, fast_zero=fast), str(failure))
        except TimeoutError:
            self._fail(request, EIO, "the device did not answer in time")
        except Exception:
            # A device's bug is that request's error; the connection and its neighbours live on.
            _log.exception("the device of export %r failed", self.session.export)
            self._fail(request, EIO, "internal error")
        else:
            if isinstance(payload, memoryview):
                # Only now: after a timeout a thread may still be reading it.
                self._turn.payloads.give_back(payload)
            self._sender.answer(reply)

    async def _read(self, request: Request) -> Sequence[Buffer]:
        buffers = await self.device.read(request.offset, request.length)
        if self.stream.copies:
            buffers = (await self.device.read_copied(request.offset, request.length),)
        if sum(map(len, buffers)) != request.length:
            raise DeviceError(errno.EIO, "a read came back short")
        return buffers

    def _fail(self, request: Request, error: int, message: str = "") -> None:
        self._counters.errors += 1
        mode = self.session.mode
        self._sender.answer(encode_error(mode, request.cookie, request.offset, error, message))


def _not_now(offset: int, length: int) -> None:  # noqa: ARG001
    """A try_read that never succeeds."""
    return
