"""TLS under a connection, through memory buffers so that the socket stays ours and non-blocking.

Encrypting reads the bytes in this process, where a bad mapped page would be a signal: `copies`
tells the connection to hand over private copies only.
"""

import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence

from nbdserver.streams import Buffer

_RECORD = 64 << 10
_TAKEN_AT_ONCE = 256 << 10


class TlsStream:
    """The server's side of TLS on a non-blocking socket; closing it says goodbye and closes."""

    copies = True

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.socket = sock
        self.read_fd = self.write_fd = sock.fileno()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unsent = b""
        self._broken = False
        self.recv_into: Callable[[memoryview], int] = self._receive
        self.sendmsg: Callable[[Sequence[Buffer]], int] = self._send

    @property
    def unsent(self) -> bool:
        """Ciphertext that the socket has not taken yet."""
        return bool(self._unsent) or self._outgoing.pending > 0

    def handshake_step(self) -> bool:
        """Go on with the TLS handshake; True when it is done, False when more input is needed.

        Raises OSError (ssl.SSLError among them) when it failed; the alert is still sent.
        """
        while True:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                try:
                    data = self.socket.recv(_RECORD)
                except (BlockingIOError, InterruptedError):
                    return False
                if not data:
                    raise ConnectionResetError("closed during the TLS handshake") from None
                self._incoming.write(data)
                continue
            except ssl.SSLError:
                self._broken = True
                with contextlib.suppress(OSError):
                    self.flush()
                raise
            return True

    def _receive(self, view: memoryview) -> int:
        while True:
            try:
                # The stub lacks the overload with a buffer, which answers a count.
                return self._ssl.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                data = self.socket.recv(_RECORD)
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0
            except ssl.SSLError:
                self._broken = True
                raise

    def _send(self, buffers: Sequence[Buffer]) -> int:
        self.flush()
        taken: list[Buffer] = []
        size = 0
        for buffer in buffers:
            taken.append(buffer)
            size += len(buffer)
            if size >= _TAKEN_AT_ONCE:
                break
        size = self._ssl.write(b"".join(taken))
        with contextlib.suppress(BlockingIOError, InterruptedError):
            self.flush()
        return size

    def flush(self) -> None:
        """Send ciphertext; BlockingIOError when some must wait."""
        while self.unsent:
            if not self._unsent:
                self._unsent = self._outgoing.read()
            sent = self.socket.send(self._unsent)
            self._unsent = self._unsent[sent:]

    def close(self) -> None:
        """Say goodbye as far as the socket takes it, and close."""
        if not self._broken:
            with contextlib.suppress(OSError):
                self._ssl.unwrap()
        with contextlib.suppress(OSError):
            self.flush()
        self.socket.close()
