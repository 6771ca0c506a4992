"""Clients that mean no good, after rows of the bad-input catalogue: each attack until it is killed.

`python nbdattacks.py NAME SOCKET` prints "ready" once its attack is under way.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

_OPTION = struct.Struct(">QII")
_REQUEST = struct.Struct(">IHH8sQI")
_IHAVEOPT = 0x49484156454F5054
_MAGIC = 0x25609513
_GO, _LIST, _ACK = 7, 3, 1
_READ, _WRITE, _FLUSH = 0, 1, 3
_GO_BODY = struct.pack(">IH", 0, 0)


def option(number: int, body: bytes = b"") -> bytes:
    """One option of the handshake."""
    return _OPTION.pack(_IHAVEOPT, number, len(body)) + body


def request(command: int, offset: int, length: int, cookie: int = 0) -> bytes:
    """One request header."""
    return _REQUEST.pack(_MAGIC, 0, command, cookie.to_bytes(8, "big"), offset, length)


def received(sock: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes; raises ConnectionError at the end of the stream."""
    got = b""
    while len(got) < count:
        piece = sock.recv(count - len(got))
        if not piece:
            raise ConnectionError("closed")
        got += piece
    return got


def greeted(path: str) -> socket.socket:
    """A client that may send options."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(path)
    received(sock, 18)
    sock.sendall(struct.pack(">I", 3))
    return sock


def connected(path: str) -> socket.socket:
    """A client in its transmission phase."""
    sock = greeted(path)
    sock.sendall(option(_GO, _GO_BODY))
    while True:
        kind, length = struct.unpack(">II", received(sock, 20)[12:])
        received(sock, length)
        if kind == _ACK:
            return sock


def slow_readers(path: str) -> Iterator[None]:
    """F19: 50 clients ask for 16 MiB each and read a byte now and then."""
    crowd = [connected(path) for _ in range(50)]
    for sock in crowd:
        sock.sendall(b"".join(request(_READ, 0, 1 << 20) for _ in range(16)))
    while True:
        for sock in crowd:
            sock.recv(1)
        yield
        time.sleep(0.05)


def option_flood(path: str) -> Iterator[None]:
    """A client that sends unknown options until it is thrown out, and comes again."""
    flood = b"".join(option(0x4000 + number, bytes(100)) for number in range(100))
    while True:
        with greeted(path) as sock:
            try:
                sock.sendall(flood)
                while sock.recv(1 << 16):
                    pass
            except OSError:
                pass
        yield


def listing(path: str) -> Iterator[None]:
    """E28: LIST, again and again."""
    while True:
        with greeted(path) as sock:
            try:
                for _ in range(50):
                    sock.sendall(option(_LIST))
                    sock.recv(1 << 16)
            except OSError:
                pass
        yield


def in_flight(path: str) -> Iterator[None]:
    """F20: as many 4 KiB reads as the server takes, all the time."""
    return _pipelined(path, b"".join(request(_READ, at << 12, 4096) for at in range(1024)))


def large_reads(path: str) -> Iterator[None]:
    """Reads of 32 MiB, eight in flight."""
    return _pipelined(path, b"".join(request(_READ, 0, 32 << 20) for _ in range(8)))


def flushes(path: str) -> Iterator[None]:
    """F8: FLUSH with a range, which is an error each time."""
    return _pipelined(path, b"".join(request(_FLUSH, 1, 1) for _ in range(1024)))


def _pipelined(path: str, batch: bytes) -> Iterator[None]:
    sock = connected(path)
    sock.setblocking(False)
    left, room = b"", bytearray(1 << 20)
    while True:
        left = left or batch
        readable, writable, _ = select.select([sock], [sock], [], 20)
        if readable and not sock.recv_into(room):
            raise ConnectionError("closed")
        if writable:
            left = left[sock.send(left) :]
        yield


def half_writes(path: str) -> Iterator[None]:
    """F15: 50 clients announce writes of 32 MiB and send a few bytes now and then."""
    crowd = [connected(path) for _ in range(50)]
    for sock in crowd:
        sock.sendall(request(_WRITE, 0, 32 << 20))
    while True:
        for sock in crowd:
            sock.sendall(bytes(100))
        yield
        time.sleep(0.02)


def come_and_go(path: str) -> Iterator[None]:
    """E34: clients that enter the transmission phase and leave."""
    while True:
        connected(path).close()
        yield


def junk(path: str) -> Iterator[None]:
    """E31: a megabyte that is no NBD."""
    while True:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(path)
            with contextlib.suppress(OSError):
                sock.sendall(b"GET / HTTP/1.1\r\n" * 65536)
        yield


def byte_by_byte(path: str) -> Iterator[None]:
    """E32: 50 clients send their requests a byte at a time."""
    crowd = [connected(path) for _ in range(50)]
    data = request(_READ, 0, 512)
    while True:
        for byte in data:
            for sock in crowd:
                sock.sendall(bytes([byte]))
        for sock in crowd:
            received(sock, 16 + 512)
        yield


def idle(path: str) -> Iterator[None]:
    """E33: 1,000 clients that do nothing."""
    crowd = [connected(path) for _ in range(1000)]
    while crowd:
        yield
        time.sleep(0.5)


ATTACKS: dict[str, Callable[[str], Iterator[None]]] = {
    attack.__name__: attack
    for attack in (
        idle,
        slow_readers,
        half_writes,
        byte_by_byte,
        junk,
        come_and_go,
        option_flood,
        listing,
        flushes,
        in_flight,
        large_reads,
    )
}


def main() -> None:
    """Attacks until it is killed."""
    steps = ATTACKS[sys.argv[1]](sys.argv[2])
    next(steps)
    print("ready", flush=True)
    for _step in steps:
        pass


if __name__ == "__main__":
    main()
