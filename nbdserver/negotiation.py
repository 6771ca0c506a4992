"""Drives one client's handshake machine over a stream, until it has a session or is gone.

It owns the stream until the session is agreed; deadlines are the caller's.
"""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from nbdserver.device import Device
from nbdserver.exports import Exports, UnknownExport
from nbdserver.limits import Limits
from nbdserver.protocol.constants import ExportFlag, OptionReply
from nbdserver.protocol.errors import ProtocolViolation
from nbdserver.protocol.handshake import Event, Handshake, TlsMode
from nbdserver.protocol.options import Choice, ContextQuery
from nbdserver.protocol.session import ExportFacts, Session
from nbdserver.streams import SocketStream, Stream
from nbdserver.tls import TlsStream


class ClientGone(Exception):
    """The client ended the session before it entered transmission."""


@dataclass(frozen=True)
class Negotiated:
    """A client ready for transmission: `rest` are bytes of its first requests."""

    stream: Stream
    name: str
    device: Device
    session: Session
    rest: bytes


@dataclass(frozen=True)
class TlsPolicy:
    """Whether to offer or demand TLS, and with which certificates."""

    mode: TlsMode = TlsMode.OFF
    context: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if (self.mode is TlsMode.OFF) != (self.context is None):
            raise ValueError("an SSL context is given exactly when TLS is offered")


def export_facts(name: str, device: Device) -> ExportFacts:
    """What the handshake tells of a device."""
    sizes = device.block_sizes
    flags: int = ExportFlag.HAS_FLAGS
    for wanted, flag in (
        (device.read_only, ExportFlag.READ_ONLY),
        (device.can_flush, ExportFlag.SEND_FLUSH),
        (device.can_fua, ExportFlag.SEND_FUA),
        (device.is_rotational, ExportFlag.ROTATIONAL),
        (device.can_trim and not device.read_only, ExportFlag.SEND_TRIM),
        (device.can_zero and not device.read_only, ExportFlag.SEND_WRITE_ZEROES),
        (
            device.can_zero and device.can_fast_zero and not device.read_only,
            ExportFlag.SEND_FAST_ZERO,
        ),
        (device.can_cache, ExportFlag.SEND_CACHE),
        (device.can_multi_conn, ExportFlag.CAN_MULTI_CONN),
    ):
        if wanted:
            flags |= flag
    return ExportFacts(
        name=name,
        size=device.size,
        flags=flags,
        minimum=sizes.minimum,
        preferred=sizes.preferred,
        maximum=sizes.maximum,
        description=device.description,
        contexts=tuple(device.contexts),
    )


class Negotiation:
    """One handshake. `run` answers a Negotiated or raises ClientGone or ProtocolViolation."""

    def __init__(
        self,
        stream: Stream,
        exports: Exports,
        *,
        tls: TlsPolicy,
        limits: Limits,
        scratch: memoryview,
        shutting_down: Callable[[], bool],
    ) -> None:
        self.stream = stream
        self._exports = exports
        self._tls = tls
        self._limits = limits
        self._scratch = scratch
        self._shutting_down = shutting_down
        self._machine = Handshake(
            tls=tls.mode, max_options=limits.options, max_option_bytes=limits.option_bytes
        )

    async def run(self) -> Negotiated:
        """Talk until the session is agreed."""
        machine = self._machine
        await self._send(machine.take_output())
        while True:
            event = machine.next_event()
            if event is None:
                await self._send(machine.take_output())
                machine.receive(await self._receive())
                continue
            if event is Event.ABORTED:
                await self._send(machine.take_output())
                raise ClientGone
            if event is Event.START_TLS:
                await self._send(machine.take_output())
                await self._start_tls()
                machine.tls_started()
            elif self._shutting_down():
                self._refuse(event, OptionReply.ERR_SHUTDOWN, "the server is shutting down")
            elif event is Event.LIST:
                self._list()
            elif isinstance(event, ContextQuery):
                await self._answer_contexts(event)
            elif isinstance(event, Choice):
                device = await self._choose(event)
                if device is not None and machine.session is not None:
                    return await self._agreed(event.name, device, machine.session)

    def _refuse(self, event: object, kind: OptionReply, message: str) -> None:
        if isinstance(event, Choice):
            self._machine.refuse_choice(event, kind, message)
        else:
            self._machine.refuse(kind, message)

    def _list(self) -> None:
        names = self._exports.names()
        if names is None:
            self._machine.refuse(OptionReply.ERR_POLICY, "listing is not allowed here")
        elif len(names) > self._limits.listed_exports:
            self._machine.refuse(OptionReply.ERR_TOO_BIG, "too many exports to list")
        else:
            self._machine.answer_list([(name, "") for name in names])

    async def _answer_contexts(self, query: ContextQuery) -> None:
        try:
            device = await self._exports.open(query.name)
        except UnknownExport:
            self._machine.refuse(OptionReply.ERR_UNKNOWN, "no such export")
            return
        contexts = tuple(device.contexts)
        await self._exports.leave(query.name, device)
        self._machine.answer_contexts(query, contexts)

    async def _choose(self, choice: Choice) -> Device | None:
        """Answer INFO, GO or EXPORT_NAME; the device that is now in use, if one is."""
        try:
            device = await self._exports.open(choice.name)
        except UnknownExport:
            self._machine.refuse_choice(choice, OptionReply.ERR_UNKNOWN, "no such export")
            return None
        self._machine.answer_choice(choice, export_facts(choice.name, device))
        if not choice.go:
            await self._exports.leave(choice.name, device)
            return None
        return device

    async def _agreed(self, name: str, device: Device, session: Session) -> Negotiated:
        try:
            await self._send(self._machine.take_output())
        except BaseException:
            await self._exports.leave(name, device)
            raise
        return Negotiated(self.stream, name, device, session, self._machine.take_rest())

    # --- bytes ---

    async def _receive(self) -> bytes:
        while True:
            try:
                count = self.stream.recv_into(self._scratch)
            except (BlockingIOError, InterruptedError):
                await _ready(self.stream.read_fd, writing=False)
                continue
            except OSError as failure:
                raise ClientGone from failure
            if count == 0:
                raise ClientGone
            return bytes(self._scratch[:count])

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view or self.stream.unsent:
            try:
                self.stream.flush()
                if view:
                    view = view[self.stream.sendmsg([view]) :]
            except (BlockingIOError, InterruptedError):
                await _ready(self.stream.write_fd, writing=True)
            except OSError as failure:
                raise ClientGone from failure

    async def _start_tls(self) -> None:
        if not isinstance(self.stream, SocketStream) or self._tls.context is None:
            raise ProtocolViolation("TLS needs a socket")
        secure = TlsStream(self.stream.socket, self._tls.context)
        self.stream = secure
        while True:
            try:
                finished = secure.handshake_step()
            except OSError as failure:
                raise ClientGone(f"TLS: {failure}") from failure
            while secure.unsent:
                try:
                    secure.flush()
                except (BlockingIOError, InterruptedError):
                    await _ready(secure.write_fd, writing=True)
                except OSError as failure:
                    raise ClientGone from failure
            if finished:
                return
            await _ready(secure.read_fd, writing=False)


async def _ready(fd: int, *, writing: bool) -> None:
    """Wait until the descriptor can be read or written."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not future.done():
            future.set_result(None)

    if writing:
        loop.add_writer(fd, wake)
    else:
        loop.add_reader(fd, wake)
    try:
        await future
    finally:
        if writing:
            loop.remove_writer(fd)
        else:
            loop.remove_reader(fd)
