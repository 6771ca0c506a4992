"""The client's side of the handshake, as far as the kernel's client needs it: GO, simple replies.

A pure machine: it never asks for structured replies, because the kernel does not know them.
"""

from dataclasses import dataclass
from struct import Struct

from nbdserver.protocol.constants import (
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
)
from nbdserver.protocol.errors import ProtocolViolation

_GREETING = Struct(">QQH")
_OPTION = Struct(">QII")
_REPLY = Struct(">QIII")
_MAX_REPLY = 64 << 10


@dataclass(frozen=True)
class ServerExport:
    """What the server told of an export: bytes, and `ExportFlag` bits."""

    size: int
    flags: int
    minimum: int = 1
    preferred: int = 4096
    maximum: int = 32 << 20


class ClientHandshake:
    """Ask for one export by GO. Feed bytes to `receive`; `export` is set when transmission began.

    Raises ProtocolViolation for a server that breaks the protocol, LookupError for a refusal.
    """

    def __init__(self, name: str) -> None:
        self._name = name.encode()
        self._input = bytearray()
        self._greeted = False
        self._found: dict[str, int] = {}
        self.export: ServerExport | None = None

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the server; the bytes to send now."""
        self._input += data
        output = b""
        if not self._greeted:
            if len(self._input) < _GREETING.size:
                return b""
            magic, options, flags = _GREETING.unpack_from(self._input)
            del self._input[: _GREETING.size]
            if magic != NBD_MAGIC or options != OPTION_MAGIC:
                raise ProtocolViolation("the server does not speak newstyle NBD")
            if not flags & HandshakeFlag.FIXED_NEWSTYLE:
                raise ProtocolViolation("the server does not speak fixed newstyle NBD")
            self._greeted = True
            output = HandshakeFlag.FIXED_NEWSTYLE.to_bytes(4, "big") + self._go()
        while self.export is None and len(self._input) >= _REPLY.size:
            magic, option, kind, length = _REPLY.unpack_from(self._input)
            if magic != OPTION_REPLY_MAGIC or option != Option.GO or length > _MAX_REPLY:
                raise ProtocolViolation("a malformed option reply")
            if len(self._input) < _REPLY.size + length:
                break
            body = bytes(self._input[_REPLY.size : _REPLY.size + length])
            del self._input[: _REPLY.size + length]
            self._take(kind, body)
        return output

    def _go(self) -> bytes:
        name = len(self._name).to_bytes(4, "big") + self._name
        body = name + b"\0\1" + int(Info.BLOCK_SIZE).to_bytes(2, "big")
        return _OPTION.pack(OPTION_MAGIC, Option.GO, len(body)) + body

    def _take(self, kind: int, body: bytes) -> None:
        if kind & 1 << 31:
            text = body.decode("utf-8", "replace")
            raise LookupError(f"export refused: {text or hex(kind)}")
        if kind == OptionReply.ACK:
            if "size" not in self._found:
                raise ProtocolViolation("the server did not tell the export's size")
            self.export = ServerExport(**self._found)
        elif kind == OptionReply.INFO and len(body) >= 2:
            info = int.from_bytes(body[:2], "big")
            if info == Info.EXPORT and len(body) == 12:
                self._found["size"] = int.from_bytes(body[2:10], "big")
                self._found["flags"] = int.from_bytes(body[10:12], "big")
            elif info == Info.BLOCK_SIZE and len(body) == 14:
                for index, name in enumerate(("minimum", "preferred", "maximum")):
                    start = 2 + 4 * index
                    self._found[name] = int.from_bytes(body[start : start + 4], "big")
