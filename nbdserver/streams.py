"""Non-blocking byte streams under a connection: a socket, or a pair of pipes; TLS is in `tls`.

`recv_into` and `sendmsg` behave like a non-blocking socket's: BlockingIOError for "not now", 0 for
the end of input, OSError with EFAULT when a mapped page cannot be read.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class Stream(Protocol):
    """What a connection needs of its transport. `read_fd` and `write_fd` may be the same."""

    read_fd: int
    write_fd: int
    copies: bool
    """Python touches the bytes on their way (TLS): mapped pages must be copied before."""
    recv_into: Callable[[memoryview], int]
    sendmsg: Callable[[Sequence[Buffer]], int]

    @property
    def unsent(self) -> bool:
        """Bytes taken by `sendmsg` still wait inside the stream."""
        ...

    def flush(self) -> None:
        """Send what waits inside; BlockingIOError when some must still wait."""
        ...

    def close(self) -> None: ...


class SocketStream:
    """A stream socket, made non-blocking; closing it closes the socket."""

    copies = False
    unsent = False

    def __init__(self, sock: socket.socket, *, send_buffer_bytes: int) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.read_fd = self.write_fd = sock.fileno()
        self.recv_into: Callable[[memoryview], int] = sock.recv_into
        self.sendmsg: Callable[[Sequence[Buffer]], int] = sock.sendmsg
        tune_socket(sock, send_buffer_bytes)

    def flush(self) -> None:
        """A socket holds nothing back."""

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class PipeStream:
    """A pair of file descriptors (stdin and stdout); closing it closes both."""

    copies = False
    unsent = False

    def __init__(self, read_fd: int, write_fd: int) -> None:
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self.read_fd, self.write_fd = read_fd, write_fd
        self.recv_into: Callable[[memoryview], int] = self._read_into
        self.sendmsg: Callable[[Sequence[Buffer]], int] = self._write

    def _read_into(self, view: memoryview) -> int:
        return os.readv(self.read_fd, [view])

    def _write(self, buffers: Sequence[Buffer]) -> int:
        return os.writev(self.write_fd, buffers)

    def flush(self) -> None:
        """A pipe holds nothing back."""

    def close(self) -> None:
        """Close both ends."""
        os.close(self.read_fd)
        if self.write_fd != self.read_fd:
            os.close(self.write_fd)


# socket.SO_SNDBUFFORCE is not named in the standard library.
_SO_SNDBUFFORCE = 32


def tune_socket(sock: socket.socket, send_buffer_bytes: int) -> None:
    """Send without delay, from a buffer large enough for a batch (as far as the host allows)."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return  # TCP tunes its own buffers, and setting one ends that.
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, send_buffer_bytes)
    except PermissionError:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
