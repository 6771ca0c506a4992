"""Requests of the transmission phase: gathering of batched hits, parsing, and the one validation.

Byte tables (big endian): compact request = magic u32, flags u16, type u16, cookie 8 bytes, offset
u64, length u32 (28 bytes); extended request = the same with length u64 (32 bytes).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct

from nbdserver.protocol.constants import (
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    ExportFlag,
    ReplyMode,
)
from nbdserver.protocol.errors import EINVAL, ENOSPC, EPERM, ProtocolViolation
from nbdserver.protocol.replies import EXTENDED_DATA, SIMPLE_OK, STRUCTURED_DATA
from nbdserver.protocol.session import Session

Buffer = bytes | bytearray | memoryview

# magic, flags and type are read as one number, so that "a plain READ" is one comparison.
_COMPACT = Struct(">Q8sQI")
_EXTENDED = Struct(">Q8sQQ")
_STRUCTURED_READ = Struct(">8s8sIQ")
_EXTENDED_READ = Struct(">8s8sQQQ")

_KNOWN_FLAGS: dict[int, int] = {
    Command.READ: CommandFlag.DF,
    Command.WRITE: 0,
    Command.DISC: 0,
    Command.FLUSH: 0,
    Command.TRIM: 0,
    Command.CACHE: 0,
    Command.WRITE_ZEROES: CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.REQ_ONE,
}
_WRITES = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_NEEDS_FLAG: dict[int, int] = {
    Command.FLUSH: ExportFlag.SEND_FLUSH,
    Command.TRIM: ExportFlag.SEND_TRIM,
    Command.WRITE_ZEROES: ExportFlag.SEND_WRITE_ZEROES,
}


@dataclass(frozen=True, slots=True)
class Request:
    """One parsed request; `payload` is how many bytes follow its header on the wire.

    `done` bytes of a write's payload are on the device already; only the rest is still to be given.
    """

    command: int
    flags: int
    cookie: bytes
    offset: int
    length: int
    payload: int
    done: int = 0


class RequestLayout:
    """How requests are framed and read hits are answered in one session. Holds no state."""

    __slots__ = (
        "_maximum",
        "_mode",
        "_read_key",
        "_size",
        "_struct",
        "_unaligned",
        "_write_key",
        "header_size",
    )

    def __init__(self, session: Session) -> None:
        extended = session.mode is ReplyMode.EXTENDED
        self._struct = _EXTENDED if extended else _COMPACT
        self._mode = int(session.mode)
        self._read_key = (EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC) << 32
        self._write_key = self._read_key | int(Command.WRITE)
        if extended:
            self._write_key |= int(CommandFlag.PAYLOAD_LEN) << 16
        if session.flags & ExportFlag.READ_ONLY:
            self._write_key = -1
        self._size = session.size
        self._maximum = session.maximum
        self._unaligned = session.minimum - 1
        self.header_size = self._struct.size

    def gather_hits(  # noqa: PLR0917  # called for every batch: keywords cost time
        self,
        requests: memoryview,
        start: int,
        end: int,
        try_read: Callable[[int, int], Sequence[Buffer] | None],
        iov: list[Buffer],
        ranges: list[tuple[int, int, bool]],
        room: int,
    ) -> tuple[int, int]:
        """Answer plain reads that are hits, until one is not, or `room` bytes are gathered.

        Appends headers and buffers to `iov` and (offset, length, True) to `ranges`; returns the
        position of the first request not answered and the number of bytes appended.
        """
        head = self.header_size
        read_key, size, maximum = self._read_key, self._size, self._maximum
        unaligned, mode = self._unaligned, self._mode
        append, note, structured = iov.append, ranges.append, _STRUCTURED_READ.pack
        total = 0
        stop = start + (end - start) // head * head
        for key, cookie, offset, length in self._struct.iter_unpack(requests[start:stop]):
            if (
                key != read_key
                or not 0 < length <= maximum
                or offset + length > size
                or (offset | length) & unaligned
            ):
                break
            buffers = try_read(offset, length)
            if buffers is None:
                break
            size_read = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
            if size_read != length:
                break  # A device's mistake: the slow path answers an error.
            if mode == 0:
                append(SIMPLE_OK + cookie)
                total += 16 + length
            elif mode == 1:
                append(structured(STRUCTURED_DATA, cookie, length + 8, offset))
                total += 28 + length
            else:
                append(_EXTENDED_READ.pack(EXTENDED_DATA, cookie, offset, length + 8, offset))
                total += 40 + length
            iov += buffers
            note((offset, length, True))
            start += head
            if total >= room or len(iov) > 512:
                break
        return start, total

    def encode(self, request: Request) -> bytes:
        """The header of a parsed request, as its client sent it."""
        key = self._read_key | request.flags << 16 | request.command
        return self._struct.pack(key, request.cookie, request.offset, request.length)

    def plain_write(
        self, requests: memoryview, position: int, end: int
    ) -> tuple[bytes, int, int] | None:
        """(cookie, offset, length) of a write without flags, valid and here with its payload."""
        room = end - position - self.header_size
        if room < 0:
            return None
        key, cookie, offset, length = self._struct.unpack_from(requests, position)
        if (
            key != self._write_key
            or not 0 < length <= room
            or length > self._maximum
            or offset + length > self._size
            or (offset | length) & self._unaligned
        ):
            return None
        return cookie, offset, length

    def parse(self, requests: memoryview, position: int) -> Request:
        """The request at `position` (a whole header is there).

        Raises ProtocolViolation for a wrong magic: the stream is out of step and cannot go on.
        """
        key, cookie, offset, length = self._struct.unpack_from(requests, position)
        if (key ^ self._read_key) >> 32:
            raise ProtocolViolation(f"request magic {key >> 32:#010x}")
        flags, command = (key >> 16) & 0xFFFF, key & 0xFFFF
        if self._mode == ReplyMode.EXTENDED:
            payload = length if flags & CommandFlag.PAYLOAD_LEN else 0
        else:
            payload = length if command == Command.WRITE else 0
        return Request(command, flags, cookie, offset, length, payload)


def check_request(request: Request, session: Session) -> int:
    """0, or the protocol error value that this request gets; what follows trusts its fields."""
    command, flags = request.command, request.flags
    known = _KNOWN_FLAGS.get(command)
    if known is None:
        return EINVAL
    export = session.flags
    if session.mode is ReplyMode.EXTENDED:
        if command == Command.WRITE:
            if not flags & CommandFlag.PAYLOAD_LEN:
                return EINVAL
            known |= CommandFlag.PAYLOAD_LEN
        elif command == Command.BLOCK_STATUS and export & ExportFlag.BLOCK_STATUS_PAYLOAD:
            known |= CommandFlag.PAYLOAD_LEN
    # Where FUA is advertised the document has it accepted on every command, reads too.
    if flags & ~(known | CommandFlag.FUA):
        return EINVAL
    if flags & CommandFlag.FUA and not export & ExportFlag.SEND_FUA:
        return EINVAL
    if flags & CommandFlag.DF and not export & ExportFlag.SEND_DF:
        return EINVAL
    if flags & CommandFlag.FAST_ZERO and not export & ExportFlag.SEND_FAST_ZERO:
        return EINVAL
    if command in _WRITES and export & ExportFlag.READ_ONLY:
        return EPERM
    needed = _NEEDS_FLAG.get(command)
    if needed and not export & needed:
        return EINVAL
    if command in (Command.FLUSH, Command.DISC):
        return EINVAL if request.offset or request.length else 0
    return _check_range(request, session)


def _check_range(request: Request, session: Session) -> int:
    command, offset, length = request.command, request.offset, request.length
    if command == Command.BLOCK_STATUS:
        if not session.contexts:
            return EINVAL
        if request.flags & CommandFlag.PAYLOAD_LEN:
            # The effect length lies in the payload; block_status_payload() checks the rest.
            return EINVAL if offset >= session.size else 0
    if length == 0 or (offset | length) & (session.minimum - 1):
        # An unaligned end of an unaligned export cannot be named at all, as the document says.
        return EINVAL
    if command in (Command.READ, Command.WRITE) and length > session.maximum:
        return EINVAL
    if offset + length > session.size:
        return ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else EINVAL
    return 0


def block_status_payload(
    request: Request, payload: bytes, session: Session
) -> tuple[int, tuple[tuple[int, str], ...]] | None:
    """(effect length, contexts) of BLOCK_STATUS's payload form, or None where it is EINVAL."""
    if len(payload) < 8 or (len(payload) - 8) % 4:
        return None
    length = int.from_bytes(payload[:8], "big")
    if length == 0 or request.offset + length > session.size:
        return None
    wanted = [int.from_bytes(payload[at : at + 4], "big") for at in range(8, len(payload), 4)]
    chosen = tuple(pair for pair in session.contexts if pair[0] in wanted)
    if not wanted or len(chosen) != len(wanted):
        return None
    return length, chosen
