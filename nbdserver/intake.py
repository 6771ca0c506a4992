"""Payloads on their way to the device: from the receive buffer, in pieces, or in their own memory.

An Intake owns what one connection has received of a request that is not here whole. A large write
goes to the device piece by piece while the rest is still coming: the client sends on meanwhile, and
nobody needs memory for it. Until all of it is written nobody is told anything, so a client that
leaves in the middle has a write without an answer, which may be there in part on any disk.
"""

from dataclasses import replace

from nbdserver.counters import Counters
from nbdserver.device import Buffer, Device, DeviceError
from nbdserver.inflight import InFlight
from nbdserver.payloads import PayloadPool
from nbdserver.protocol.constants import Command, CommandFlag
from nbdserver.protocol.errors import wire_error
from nbdserver.protocol.replies import encode_done
from nbdserver.protocol.requests import Request, RequestLayout
from nbdserver.protocol.session import Session
from nbdserver.sender import Sender

_POURED_UNITS = 4


class Intake:
    """`skip` is how many bytes of a refused payload are still to come and to be dropped; `memory`,
    while there is some, where a payload is gathered; `busy` tells that payloads come, so that much
    is worth receiving at once.
    """

    def __init__(
        self,
        *,
        session: Session,
        device: Device,
        layout: RequestLayout,
        counters: Counters,
        sender: Sender,
        inflight: InFlight,
        payloads: PayloadPool,
        receive_bytes: int,
        skip: int,
    ) -> None:
        self.skip = skip
        self.busy = False
        self.memory: memoryview | None = None
        self._session = session
        self._device = device
        self._try_write = device.try_write
        self._layout = layout
        self._counters = counters
        self._sender = sender
        self._inflight = inflight
        self._payloads = payloads
        # Pieces end where a block ends, so that no block has to be completed from elsewhere.
        unit = device.block_sizes.preferred
        self._unit = unit if 2 * unit <= receive_bytes else 0
        self._request: Request | None = None
        self._poured = 0
        self._filled = 0
        self._written = b""

    @property
    def unfinished(self) -> bool:
        """What comes next into the receive buffer belongs to a request begun before."""
        return bool(self.skip) or (self._request is not None and self.memory is None)

    def room(self) -> memoryview:
        """While there is memory: where the next bytes are to be received."""
        assert self.memory is not None
        return self.memory[self._filled :]

    def filled(self, count: int) -> None:
        """`count` bytes are in the room; starts the request when it is whole."""
        self._filled += count
        memory, request = self.memory, self._request
        if memory is not None and request is not None and self._filled == len(memory):
            self._request = self.memory = None
            self._deliver(request, memory, private=True)
            self._sender.flush()

    def fill(self, data: bytes) -> bytes:
        """As receiving into the room; what is left belongs to the next request."""
        room = self.room()
        used = min(len(room), len(data))
        room[:used] = data[:used]
        self.filled(used)
        return data[used:]

    def take_plain(self, view: memoryview, position: int, end: int) -> int:
        """Plain writes that are here whole and that the device takes at once; the next position."""
        plain, try_write, head = self._layout.plain_write, self._try_write, self._layout.header_size
        mode = self._session.mode
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
            self.busy = True
            self._counters.writes += len(acks)
            self._sender.gather(acks)
        return position

    def begin(self, request: Request, error: int, view: memoryview, position: int, end: int) -> int:
        """Take a request's payload, which begins at `position`; the position behind what is used.

        `error` is what the request is answered, its payload being dropped; or 0.
        """
        available = min(request.payload, end - position)
        self.busy = True
        if error:
            self._inflight.fail(request, error)
            self.skip = request.payload - available
            return position + available
        if available == request.payload:
            self._deliver(request, view[position : position + available], private=False)
            return position + available
        self._request, self._poured = request, 0
        pours = request.command == Command.WRITE and not request.flags & CommandFlag.FUA
        if pours and self._unit and request.payload >= _POURED_UNITS * self._unit:
            return self.go_on(view, position, end)
        return self._gather(view, position, end)

    def go_on(self, view: memoryview, position: int, end: int) -> int:
        """Skip or pour what belongs to the request begun before; the position behind it."""
        request = self._request
        if request is None:
            skipped = min(self.skip, end - position)
            self.skip -= skipped
            return position + skipped
        left = request.length - self._poured
        piece = min(left, end - position)
        offset = request.offset + self._poured
        if piece < left:
            piece -= (offset + piece) % self._unit
        if piece <= 0:
            return position
        try:
            if not self._try_write(offset, view[position : position + piece]):
                return self._gather(view, position, end)
        except DeviceError as failure:
            self._request = None
            self._inflight.fail(request, wire_error(failure.errno), str(failure))
            self.skip = left
            return self.go_on(view, position, end)
        self._poured += piece
        if piece == left:
            self._request = None
            self._written_all(request)
        return position + piece

    def _gather(self, view: memoryview, position: int, end: int) -> int:
        """What the device has not got of the payload goes to memory of its own."""
        request = self._request
        assert request is not None
        request = self._request = replace(request, done=self._poured)
        left = request.payload - self._poured
        available = min(left, end - position)
        if available == left:
            self._request = None
            self._inflight.start(request, bytes(view[position : position + left]))
        else:
            self.memory = self._payloads.take(left)
            self.memory[:available] = view[position : position + available]
            self._filled = available
        return position + available

    def _deliver(self, request: Request, payload: memoryview, *, private: bool) -> None:
        """A request with its whole payload; not `private`: in the receive buffer, soon gone."""
        if request.command == Command.WRITE and not request.flags & CommandFlag.FUA:
            try:
                written = self._try_write(request.offset + request.done, payload)
            except DeviceError as failure:
                self._inflight.fail(request, wire_error(failure.errno), str(failure))
                return
            if written:
                if private:
                    self._payloads.give_back(payload)
                self._written_all(request)
                return
        self._inflight.start(request, payload if private else bytes(payload))

    def _written_all(self, request: Request) -> None:
        self._counters.writes += 1
        self._sender.gather([encode_done(self._session.mode, request.cookie, request.offset)])

    # --- moving to another process ---

    async def read_back(self) -> None:
        """Before `received`: what was written already is read again. Raises DeviceError."""
        self._written = b""
        request = self._request
        if request is not None and self._poured:
            self._written = await self._device.read_copied(request.offset, self._poured)

    def received(self) -> bytes:
        """The request begun, from its header on, as far as it left the receive buffer."""
        request = self._request
        if request is None:
            return b""
        gathered: Buffer = b"" if self.memory is None else self.memory[: self._filled]
        return b"".join((self._layout.encode(request), self._written, gathered))

    def drop(self) -> None:
        """Forget what is not whole."""
        self._request = self.memory = None
