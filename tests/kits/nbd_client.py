"""A blunt NBD client: it sends what it is told, right or wrong, and takes replies apart."""

import socket
import struct
from dataclasses import dataclass
from pathlib import Path

OPT = struct.Struct(">QII")
REQ = struct.Struct(">IHH8sQI")
REQ_EXT = struct.Struct(">IHH8sQQ")
IHAVEOPT = 0x49484156454F5054
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM = (0x80000000 + n for n in (1, 2, 3, 4))
ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN, ERR_BLOCK_SIZE = (0x80000000 + n for n in (5, 6, 7, 8))
ERR_TOO_BIG, ERR_EXT_HEADER = 0x80000009, 0x8000000A
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED, LIST_META, SET_META, EXTENDED = 8, 9, 10, 11
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 95, 108


class Closed(Exception):
    """The server closed the connection."""


@dataclass
class Reply:
    """One reply: `error` 0 or an NBD error value; `data` of reads; `extents` per context id."""

    cookie: bytes
    error: int = 0
    data: bytes = b""
    message: bytes = b""
    extents: dict[int, list[tuple[int, int]]] | None = None


class RawClient:
    """A blocking client with a limit of 60 s on every socket call."""

    def __init__(self, where: Path | socket.socket) -> None:
        if isinstance(where, socket.socket):
            self.sock = where
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(60)
            try:
                self.sock.connect(str(where))
            except OSError:
                self.sock.close()
                raise
        self.sock.settimeout(60)
        self.extended = self.structured = False
        self.size = self.flags = 0
        self.reads: dict[bytes, int] = {}
        self.offsets: dict[bytes, int] = {}
        self._next = 0

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def close(self) -> None:
        self.sock.close()

    # --- bytes ---

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as failure:
            raise Closed from failure

    def recv(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            try:
                piece = self.sock.recv(min(count - len(got), 1 << 20))
            except ConnectionResetError as failure:
                raise Closed from failure
            if not piece:
                raise Closed(f"after {len(got)} of {count} bytes")
            got += piece
        return bytes(got)

    def expect_closed(self) -> None:
        """Nothing more comes but the end."""
        try:
            rest = self.sock.recv(1 << 20)
        except ConnectionResetError:
            return
        assert rest == b"", f"{len(rest)} bytes instead of the end: {rest[:64]!r}"

    # --- handshake ---

    def greet(self, flags: int = 3) -> "RawClient":
        magic, options, _server = struct.unpack(">QQH", self.recv(18))
        assert (magic, options) == (0x4E42444D41474943, IHAVEOPT)
        self.send(struct.pack(">I", flags))
        return self

    def send_option(self, option: int, body: bytes = b"") -> None:
        self.send(OPT.pack(IHAVEOPT, option, len(body)) + body)

    def option_reply(self) -> tuple[int, int, bytes]:
        magic, option, kind, length = struct.unpack(">QIII", self.recv(20))
        assert magic == 0x0003E889045565A9
        return option, kind, self.recv(length)

    def option(self, option: int, body: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; all (type, body) replies up to the final one."""
        self.send_option(option, body)
        replies = []
        while True:
            answered, kind, data = self.option_reply()
            assert answered == option
            replies.append((kind, data))
            if kind == REP_ACK or kind & 0x80000000:
                return replies

    def verdict(self, option: int, body: bytes = b"") -> int:
        """The type of the final reply."""
        return self.option(option, body)[-1][0]

    def go(
        self,
        name: bytes = b"disk",
        *,
        structured: bool = False,
        extended: bool = False,
        contexts: tuple[bytes, ...] = (),
        infos: tuple[int, ...] = (),
    ) -> dict[int, bytes]:
        """Enter transmission; the INFO replies by type."""
        if structured:
            assert self.verdict(STRUCTURED) == REP_ACK
            self.structured = True
        if extended:
            assert self.verdict(EXTENDED) == REP_ACK
            self.extended = True
        if contexts:
            assert self.verdict(SET_META, meta_body(name, *contexts)) == REP_ACK
        replies = self.option(GO, go_body(name, *infos))
        assert replies[-1][0] == REP_ACK, hex(replies[-1][0])
        found = {struct.unpack(">H", body[:2])[0]: body[2:] for kind, body in replies[:-1]}
        self.size, self.flags = struct.unpack(">QH", found[0])
        return found

    # --- transmission ---

    def cookie(self) -> bytes:
        self._next += 1
        return self._next.to_bytes(8, "big")

    def pack(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        *,
        payload: bytes = b"",
        cookie: bytes | None = None,
    ) -> bytes:
        """A request; remembers what a simple read reply needs to be read."""
        cookie = cookie or self.cookie()
        self.last = cookie
        self.offsets[cookie] = offset
        if command == READ:
            self.reads[cookie] = length
        if self.extended:
            if command == WRITE:
                flags |= PAYLOAD_LEN
            return REQ_EXT.pack(0x21E41C71, flags, command, cookie, offset, length) + payload
        return REQ.pack(0x25609513, flags, command, cookie, offset, length) + payload

    def reply(self) -> Reply:
        """The next complete reply (chunks of one reply must not be interleaved here)."""
        result: Reply | None = None
        while True:
            magic = struct.unpack(">I", self.recv(4))[0]
            if magic == 0x67446698:
                assert not self.extended
                error, cookie = struct.unpack(">I8s", self.recv(12))
                length = self.reads.pop(cookie, 0)
                assert not (length and self.structured), "a simple reply to a structured read"
                return Reply(cookie, error, self.recv(length) if not error else b"")
            if self.extended:
                assert magic == 0x6E8A278C, hex(magic)
                flags, kind, cookie, offset, length = struct.unpack(">HH8sQQ", self.recv(28))
                assert offset == self.offsets.get(cookie, offset)
            else:
                assert magic == 0x668E33EF and self.structured, hex(magic)
                flags, kind, cookie, length = struct.unpack(">HH8sI", self.recv(16))
            body = self.recv(length)
            result = result or Reply(cookie)
            assert result.cookie == cookie
            if kind == 1:
                result.data += body[8:]
            elif kind & 0x8000:
                result.error, size = struct.unpack(">IH", body[:6])
                result.message = body[6 : 6 + size]
            elif kind in (5, 6):
                result.extents = result.extents or {}
                if kind == 5:
                    number = struct.unpack(">I", body[:4])[0]
                    pairs = list(struct.iter_unpack(">II", body[4:]))
                else:
                    number, count = struct.unpack(">II", body[:8])
                    pairs = list(struct.iter_unpack(">QQ", body[8:]))
                    assert len(pairs) == count
                result.extents[number] = pairs
            else:
                assert kind == 0 and not body and flags & 1
            if flags & 1:
                self.reads.pop(cookie, None)
                return result

    def ask(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, **more) -> Reply:
        """One request and its reply."""
        data = self.pack(command, offset, length, flags, **more)
        cookie = self.last
        self.send(data)
        reply = self.reply()
        assert reply.cookie == cookie
        return reply

    def read(self, offset: int, length: int) -> bytes:
        reply = self.ask(READ, offset, length)
        assert reply.error == 0, reply
        assert len(reply.data) == length
        return reply.data


def go_body(name: bytes, *infos: int) -> bytes:
    """GO's and INFO's body."""
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta_body(name: bytes, *queries: bytes) -> bytes:
    """LIST_META_CONTEXT's and SET_META_CONTEXT's body."""
    body = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return body + b"".join(struct.pack(">I", len(query)) + query for query in queries)
