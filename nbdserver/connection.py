"""One client in its transmission phase: requests in batches, answers from the map, misses as tasks.

A Connection owns its stream and its unanswered requests; its Sender owns answers. A read hit costs
no task, future, lock or log line: what one `recv_into` brought is answered by one `sendmsg`. The
bytes of a device are never touched here.
"""

import asyncio
import logging
from collections.abc import Callable

from nbdserver.counters import Counters
from nbdserver.device import Device
from nbdserver.inflight import InFlight, Turn
from nbdserver.intake import Intake
from nbdserver.limits import Limits
from nbdserver.patience import Patience
from nbdserver.protocol.constants import Command, ReplyMode
from nbdserver.protocol.errors import EINVAL, ESHUTDOWN, ProtocolViolation
from nbdserver.protocol.requests import Request, RequestLayout, check_request
from nbdserver.protocol.session import Session
from nbdserver.sender import Sender
from nbdserver.streams import Stream

_log = logging.getLogger(__name__)

# Of one connection in one turn of the loop: requests, and a batch sent counts as many. Less where
# another one was served lately.
_BUDGET_ALONE = 256
_BUDGET_AMONG_OTHERS = 32
_BATCH_COSTS = 64
_BATCH_BYTES = 16384  # for each request of the budget
_SMALL_RECEIVE = 16 << 10  # some 500 requests without payloads: more than a turn takes


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
        self._small = scratch[:_SMALL_RECEIVE]
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
        self._tail = rest
        self._inflight = InFlight(
            copies=stream.copies,
            session=session,
            device=device,
            limits=limits,
            counters=counters,
            sender=self._sender,
            turn=turn,
            on_answered=self._room_again,
            on_broken=self.abort,
        )
        self._intake = Intake(
            session=session,
            device=device,
            layout=self._layout,
            counters=counters,
            sender=self._sender,
            inflight=self._inflight,
            payloads=turn.payloads,
            # Decrypted bytes come in small pieces: they are gathered.
            receive_bytes=0 if stream.copies else len(scratch),
            skip=skip,
        )
        self._reading = False
        self._budget = _BUDGET_AMONG_OTHERS
        self._waits_its_turn = False
        self._patience = Patience(limits.linger_seconds)
        self._finishing = False
        self._closed = False
        self._ended = False
        self._shutting_down = False
        self._held = False
        self._taken_back: list[Request] = []
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
        self._inflight.cancel_reads()
        self._intake.drop()
        self.stream.close()
        self._maybe_done()

    async def hold(self) -> None:
        """Stop at a request boundary: read no more, return when nothing is in flight.

        Raises DeviceError where a half-received write cannot be written down.
        """
        self._held = True
        self._stop_reading()
        if (
            not self._intake.skip
        ):  # what is taken back comes before what is received, skipped or not
            self._inflight.take_back_reads(self._taken_back)
        while not self._idle and not self._closed:
            self._quiet = self._quiet or self._loop.create_future()
            await self._quiet
        await self._intake.read_back()

    def release_hold(self) -> None:
        """Go on after `hold`."""
        self._held = False
        while self._taken_back:
            self._inflight.start(self._taken_back.pop(0), b"")
        self._resume()

    @property
    def closed(self) -> bool:
        """The stream is closed or detached."""
        return self._closed

    def unparsed(self) -> bytes:
        """While held: bytes received and not answered, from a request's first byte on."""
        asked = b"".join(map(self._layout.encode, self._taken_back))
        return asked + self._intake.received() + self._tail

    @property
    def skipping(self) -> int:
        """Payload bytes of a refused request that are still to come and will be dropped."""
        return self._intake.skip

    def detach(self) -> None:
        """While held: let go of the stream without closing it (another process has it now)."""
        self._closed = True
        self._sender.close()
        self._maybe_done()

    @property
    def _idle(self) -> bool:
        return not self._inflight and self._sender.idle

    def _maybe_done(self) -> None:
        if self._closed:
            if not self._inflight and not self._ended:
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
        if self._reading or self._waits_its_turn or not self._can_read():
            return
        tail, self._tail = self._tail, b""
        self._budget = _BUDGET_AMONG_OTHERS
        while tail:
            # A tail from a handshake or a hand-over may be larger than the scratch buffer.
            if self._intake.memory is not None:
                tail = self._intake.fill(tail)
            else:
                piece, tail = tail[: len(self._scratch)], tail[len(self._scratch) :]
                self._scratch[: len(piece)] = piece
                self._process(len(piece))
            stuck = not tail or not self._can_read() or self._budget <= 0
            if self._tail:
                tail, self._tail = self._tail + tail, b""
            if stuck:
                self._tail = tail
                break
        if self._budget <= 0:
            self._let_others()
        elif self._can_read():
            self._reading = True
            self._turn.readiness.watch(self.stream.read_fd, self._readable)
            if self.stream.copies:
                # Decrypted bytes may wait inside the stream, where no selector sees them.
                self._loop.call_soon(self._readable)

    def _let_others(self) -> None:
        """Go on with what is received in the loop's next turn."""
        self._stop_reading()
        if not self._waits_its_turn:
            self._waits_its_turn = True
            self._loop.call_soon(self._have_turn)

    def _have_turn(self) -> None:
        self._waits_its_turn = False
        self._room_again()

    def _can_read(self) -> bool:
        return not (
            self._closed
            or self._finishing
            or self._held
            or self._sender.behind
            or self._inflight.full
        )

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._turn.readiness.unwatch(self.stream.read_fd)

    def _readable(self) -> None:
        turn = self._turn
        alone = turn.take(self)
        self._budget = _BUDGET_AMONG_OTHERS if turn.crowded else _BUDGET_ALONE
        # Again: what arrives while a batch is answered is taken without a turn of the loop.
        for _ in range(4 if alone else 1):
            if not self._can_read():
                self._stop_reading()
                return
            gathering = self._intake.memory is not None
            try:
                count = self._receive()
            except (BlockingIOError, InterruptedError):
                if turn.crowded or turn.waiting:
                    return
                count = self._patience.receive(self._receive)
                if count < 0:
                    return
            except OSError:
                self.abort()
                return
            if count == 0:
                self.finish()
                return
            self._counters.bytes_received += count
            if gathering:
                self._intake.filled(count)
            else:
                held, self._tail = len(self._tail), b""
                self._process(held + count)
                if self._budget <= 0:
                    self._let_others()
                    return
        if self.stream.copies and self._reading:
            self._loop.call_soon(self._readable)

    def _receive(self) -> int:
        intake, held = self._intake, len(self._tail)
        if intake.memory is not None:
            return self.stream.recv_into(intake.room())
        if not (held or intake.busy):
            return self.stream.recv_into(self._small)
        self._scratch[:held] = self._tail
        end = len(self._scratch) if intake.busy else max(_SMALL_RECEIVE, 2 * held)
        return self.stream.recv_into(self._scratch[held:end])

    def _process(self, end: int) -> None:
        """Answer the `end` bytes in the scratch buffer as far as they go; keep the tail."""
        view, layout, sender, intake = self._scratch, self._layout, self._sender, self._intake
        head = layout.header_size
        room = min(self._limits.batch_bytes, self._budget * _BATCH_BYTES)
        position = 0
        intake.busy = intake.unfinished
        while self._budget > 0:
            if intake.unfinished:
                position = intake.go_on(view, position, end)
                if intake.unfinished:
                    break
            if not self._shutting_down:
                position, added = layout.gather_hits(
                    view, position, end, self._try_read, sender.iov, sender.ranges, room
                )
                sender.size += added
                if position < end:
                    position = intake.take_plain(view, position, end)
            if end - position < head:
                break
            if len(sender.iov) > 512 or sender.size >= room:
                sender.flush()
                self._budget -= _BATCH_COSTS
                if not self._can_read():
                    break
                continue
            if not self._can_read():
                break
            position = self._take(view, position, end)
            self._budget -= 1
            if position < 0:
                return
        if position < end:
            self._tail = bytes(view[position:end])
        sender.flush()

    def _take(self, view: memoryview, position: int, end: int) -> int:
        """Start the request at `position`, which is no hit; the next position, or -1: no more."""
        try:
            request = self._layout.parse(view, position)
        except ProtocolViolation as violation:
            self._violated(str(violation))
            return -1
        position += self._layout.header_size
        if request.command == Command.DISC:
            self.finish()
            return -1
        error = ESHUTDOWN if self._shutting_down else check_request(request, self.session)
        if request.payload:
            if request.payload > self._payload_limit(request):
                self._counters.violations += 1
                self._inflight.fail(request, error or EINVAL)
                self.finish()
                return -1
            return self._intake.begin(request, error, view, position, end)
        if error:
            self._inflight.fail(request, error)
        else:
            self._inflight.start(request, b"")
        return position

    def _payload_limit(self, request: Request) -> int:
        if request.command == Command.BLOCK_STATUS:
            return self._limits.option_bytes
        extended = self.session.mode is ReplyMode.EXTENDED
        return self.session.maximum if extended else self._limits.drained_payload_bytes

    def _violated(self, reason: str) -> None:
        self._counters.violations += 1
        name = self.session.export
        _log.info("closing a client of %r: %s", name, reason, extra={"export": name})
        self._sender.flush()
        self.abort()


def _not_now(offset: int, length: int) -> None:  # noqa: ARG001
    """A try_read that never succeeds."""
    return
