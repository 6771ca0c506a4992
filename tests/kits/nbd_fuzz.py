"""Fuzz targets: arbitrary bytes from a client, against the handshake and against a connection.

Each target takes bytes and raises AssertionError where the server did anything but answer in step,
answer an error, or close. They are run by hypothesis in the tests and by atheris by hand.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import Iterator, Sequence

from nbdserver.connection import Connection, Turn
from nbdserver.counters import Counters
from nbdserver.device import BaseDevice, BlockSizes, Buffer, DeviceError, Extent
from nbdserver.limits import Limits
from nbdserver.protocol.constants import ExportFlag, OptionReply, ReplyMode
from nbdserver.protocol.errors import ProtocolViolation
from nbdserver.protocol.handshake import Event, Handshake, TlsMode
from nbdserver.protocol.options import Choice, ContextQuery
from nbdserver.protocol.session import ExportFacts, Session

SIZE = 1 << 16
CONTENT = bytes(index * 7 % 251 for index in range(SIZE))
FACTS = ExportFacts("disk", SIZE, 0x1FF, contexts=("base:allocation", "x-fuzz:y"))
LIMITS = Limits(receive_bytes=4096, batch_bytes=8192, inflight_requests=4, stalled_seconds=5.0)


def fuzz_handshake(data: bytes) -> tuple[str, bytes]:
    """First byte: TLS mode and how input is split. Answers how it ended, and the output."""
    if not data:
        return "empty", b""
    mode = (TlsMode.OFF, TlsMode.OPTIONAL, TlsMode.REQUIRED)[data[0] % 3]
    step = (1, 7, 64, len(data))[data[0] // 3 % 4]
    machine = Handshake(tls=mode)
    output = bytearray(machine.take_output())
    end = "waiting"
    try:
        for at in range(1, len(data), step):
            machine.receive(data[at : at + step])
            end = _answer(machine, output)
            if end != "waiting":
                break
    except ProtocolViolation:
        end = "violation"
    output += machine.take_output()
    _check_options(bytes(output), end)
    if end == "session":
        session = machine.session
        assert session is not None and session.size == SIZE
        assert not session.contexts or session.mode is not ReplyMode.SIMPLE
    return end, bytes(output)


def _answer(machine: Handshake, output: bytearray) -> str:
    while (event := machine.next_event()) is not None:
        if event is Event.ABORTED:
            return "aborted"
        if event is Event.START_TLS:
            machine.tls_started()
        elif event is Event.LIST:
            machine.answer_list([("disk", "a disk")])
        elif isinstance(event, ContextQuery):
            if event.name in ("", "disk"):
                machine.answer_contexts(event, FACTS.contexts)
            else:
                machine.refuse(OptionReply.ERR_UNKNOWN)
        elif isinstance(event, Choice):
            if event.name in ("", "disk"):
                machine.answer_choice(event, FACTS)
            else:
                machine.refuse_choice(event, OptionReply.ERR_UNKNOWN, "no such export")
        output += machine.take_output()
    return "session" if machine.session is not None else "waiting"


def _check_options(output: bytes, end: str) -> None:
    at = 18
    while at < len(output):
        if len(output) - at in (10, 134) and end == "session":
            break  # EXPORT_NAME's answer has no frame.
        magic, _option, kind, length = struct.unpack_from(">QIII", output, at)
        assert magic == 0x0003E889045565A9, "an answer out of step"
        assert kind in OptionReply.__members__.values() and length <= 4096
        at += 20 + length
    else:
        assert at == len(output)


class FuzzDevice(BaseDevice):
    """Constant content; some places miss, some fail."""

    size = SIZE
    read_only = False
    can_flush = can_fua = can_trim = can_zero = can_fast_zero = can_cache = can_multi_conn = True
    contexts = FACTS.contexts
    block_sizes = BlockSizes(preferred=512)

    def __init__(self) -> None:
        self.pins = 0

    def try_read(self, offset: int, length: int) -> Sequence[Buffer] | None:
        assert 0 <= offset and 0 < length and offset + length <= SIZE
        if offset % 3 == 1:
            return None
        middle = offset + length // 2
        view = memoryview(CONTENT)
        return (view[offset:middle], view[middle : offset + length])

    async def read_copied(self, offset: int, length: int) -> bytes:
        assert 0 <= offset and 0 < length and offset + length <= SIZE
        if offset % 5 == 1:
            raise DeviceError(errno.EIO)
        await asyncio.sleep(0)
        return CONTENT[offset : offset + length]

    def pin(self, offset: int, length: int):
        self.pins += 1

        def release() -> None:
            self.pins -= 1

        return release

    def try_write(self, offset: int, payload: Buffer) -> bool:
        assert 0 <= offset and 0 < len(payload) and offset + len(payload) <= SIZE
        if offset % 7 == 1:
            raise DeviceError(errno.ENOSPC)
        return offset // 512 % 5 != 1

    async def write(self, offset: int, payload: Buffer, *, fua: bool) -> None:
        assert offset + len(payload) <= SIZE and len(payload)

    async def trim(self, offset: int, length: int, *, fua: bool) -> None:
        assert offset + length <= SIZE

    async def write_zeroes(self, offset, length, *, fua, no_hole, fast) -> None:
        assert offset + length <= SIZE
        if fast:
            raise DeviceError(errno.EOPNOTSUPP)

    async def extents(self, context, offset, length, *, one) -> Sequence[Extent]:
        assert offset + length <= SIZE
        return [Extent(1000, 0), Extent(0, 3), Extent(70000, 3)]


class FuzzStream:
    """Gives input in pieces and takes output in pieces; its descriptors are always ready."""

    copies = unsent = False

    def __init__(self, data: bytes, piece: int, room: int, fds: tuple[int, int]) -> None:
        self.read_fd, self.write_fd = fds
        self._data, self._piece, self._room = data, piece, room
        self._turn = 0
        self.output = bytearray()
        self.closed = False

    def recv_into(self, view: memoryview) -> int:
        self._turn += 1
        if self._turn % 4 == 3:
            raise BlockingIOError
        piece = self._data[: min(self._piece, len(view))]
        self._data = self._data[len(piece) :]
        view[: len(piece)] = piece
        return len(piece)

    def sendmsg(self, buffers: Sequence[Buffer]) -> int:
        self._turn += 1
        if self._turn % 5 == 4:
            raise BlockingIOError
        taken = b"".join(buffers)[: self._room]
        self.output += taken
        return len(taken)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def fuzz_transmission(data: bytes) -> tuple[int, int]:
    """First byte: framing, flags and pieces. Answers (requests understood, replies)."""
    if not data:
        return 0, 0
    mode = ReplyMode(data[0] % 3)
    piece = (1, 13, 100, 5000)[data[0] // 3 % 4]
    room = (17, 1000, 1 << 20)[data[0] // 12 % 3]
    flags = 0x5F5 | ExportFlag.SEND_FAST_ZERO | (ExportFlag.SEND_DF if mode else 0)
    if data[0] >= 216:
        flags |= ExportFlag.READ_ONLY
    if mode is ReplyMode.EXTENDED:
        flags |= ExportFlag.BLOCK_STATUS_PAYLOAD
    contexts = ((1, "base:allocation"), (2, "x-fuzz:y")) if mode else ()
    session = Session("disk", SIZE, int(flags), mode, 1, SIZE, contexts)
    device = FuzzDevice()
    output = asyncio.run(_serve(data[1:], piece, room, session, device))
    assert device.pins == 0, "a pin is left"
    requests = list(_requests(data[1:], mode))
    return len(requests), _check_replies(output, requests, mode)


async def _serve(data: bytes, piece: int, room: int, session: Session, device: FuzzDevice) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        stream = FuzzStream(data, piece, room, (ours.fileno(), ours.fileno()))
        ended = asyncio.Event()
        counters, turn = Counters(), Turn()
        connection = Connection(
            stream=stream,
            session=session,
            device=device,
            limits=LIMITS,
            counters=counters,
            scratch=memoryview(bytearray(LIMITS.receive_bytes)),
            turn=turn,
            on_end=lambda _connection: ended.set(),
        )
        connection.start()
        async with asyncio.timeout(30):
            await ended.wait()
        assert stream.closed and turn.waiting == 0
        return bytes(stream.output)


def _requests(data: bytes, mode: ReplyMode) -> Iterator[tuple[bytes, int, int, int]]:
    """(cookie, command, offset, length) of what a server must understand, in order."""
    head = struct.Struct(">IHH8sQQ" if mode is ReplyMode.EXTENDED else ">IHH8sQI")
    at = 0
    while at + head.size <= len(data):
        magic, flags, command, cookie, offset, length = head.unpack_from(data, at)
        at += head.size
        if magic != (0x21E41C71 if mode is ReplyMode.EXTENDED else 0x25609513) or command == 2:
            return
        yield cookie, command, offset, length
        if mode is ReplyMode.EXTENDED:
            payload = length if flags & 32 else 0
        else:
            payload = length if command == 1 else 0
        at += payload


def _check_replies(output: bytes, requests: list, mode: ReplyMode) -> int:
    waiting: dict[bytes, list[tuple[int, int, int]]] = {}
    for cookie, command, offset, length in requests:
        waiting.setdefault(cookie, []).append((command, offset, length))
    count = at = 0
    while at + 16 <= len(output):
        (magic,) = struct.unpack_from(">I", output, at)
        if magic == 0x67446698:
            error, cookie = struct.unpack_from(">I8s", output, at + 4)
            at += 16
            found = waiting.get(cookie)
            assert found, "an answer to nothing"
            if mode is ReplyMode.SIMPLE and not error and any(item[0] == 0 for item in found):
                if len(found) > 1:
                    return count  # Ambiguous: several requests with one cookie.
                _command, offset, length = found[0]
                assert (
                    output[at : at + length]
                    == CONTENT[offset : offset + length][: len(output) - at]
                )
                at += length
            count += 1
            continue
        if mode is ReplyMode.EXTENDED:
            if at + 32 > len(output):
                break
            assert magic == 0x6E8A278C
            flags, kind, cookie, echoed, length = struct.unpack_from(">HH8sQQ", output, at + 4)
            assert any(item[1] == echoed for item in waiting[cookie])
            at += 32
        else:
            assert mode is ReplyMode.STRUCTURED and magic == 0x668E33EF, hex(magic)
            if at + 20 > len(output):
                break
            flags, kind, cookie, length = struct.unpack_from(">HH8sI", output, at + 4)
            at += 20
        assert waiting.get(cookie), "an answer to nothing"
        body = output[at : at + length]
        at += length
        if kind == 1 and len(body) == length:
            (offset,) = struct.unpack_from(">Q", body)
            assert body[8:] == CONTENT[offset : offset + length - 8]
        count += flags & 1
    assert count <= len(requests)
    return count
