"""Listening sockets, clients and their ends: accept, negotiate, serve, drain, close.

The Server owns its sockets, the tasks of handshakes and the connections. Devices belong to Exports.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from nbdserver.connection import Connection
from nbdserver.counters import Counters
from nbdserver.device import Device
from nbdserver.exports import Exports
from nbdserver.inflight import Turn
from nbdserver.limits import Limits
from nbdserver.negotiation import ClientGone, Negotiated, Negotiation, TlsPolicy
from nbdserver.protocol.errors import ProtocolViolation
from nbdserver.streams import PipeStream, SocketStream, Stream

_log = logging.getLogger(__name__)
_ACCEPTS_PER_TURN = 64


@dataclass(eq=False, slots=True)
class Listener:
    """One listening socket and the exports that its clients can name.

    `label` names it in a hand-over: the new process finds its exports by it.
    """

    socket: socket.socket
    exports: Exports
    tls: TlsPolicy
    label: str
    path: Path | None = None
    clients: int = 0
    accepting: bool = False


@dataclass(eq=False, slots=True)
class Client:
    """A connection in its transmission phase, and where it came from."""

    connection: Connection
    name: str
    device: Device
    exports: Exports
    listener: Listener | None


class Server:
    """Serves exports on any number of sockets, on the running event loop."""

    def __init__(self, *, limits: Limits | None = None, tls: TlsPolicy | None = None) -> None:
        self.limits = limits or Limits()
        self.counters = Counters()
        self.listeners: list[Listener] = []
        self.clients: dict[Connection, Client] = {}
        self._tls = tls or TlsPolicy()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._farewells: set[asyncio.Task[None]] = set()
        self._scratch = memoryview(bytearray(self.limits.receive_bytes))
        self._turn = Turn()
        self._draining = False
        self._changed = asyncio.Event()

    # --- sockets ---

    def listen_unix(
        self, path: Path, exports: Exports, *, mode: int = 0o600, tls: TlsPolicy | None = None
    ) -> Listener:
        """Listen on a unix socket; one left behind by a dead server is replaced.

        Raises OSError (EADDRINUSE when somebody answers there).
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _bind_unix(sock, path)
            path.chmod(mode)
            return self.listen_socket(sock, exports, path=path, tls=tls)
        except BaseException:
            sock.close()
            raise

    def listen_tcp(
        self, host: str, port: int, exports: Exports, *, tls: TlsPolicy | None = None
    ) -> Listener:
        """Listen on a TCP address (port 0: any). Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            return self.listen_socket(sock, exports, tls=tls)
        except BaseException:
            sock.close()
            raise

    def listen_socket(
        self,
        sock: socket.socket,
        exports: Exports,
        *,
        label: str | None = None,
        path: Path | None = None,
        tls: TlsPolicy | None = None,
    ) -> Listener:
        """Serve a bound socket (a given one, or one from socket activation); the server owns it."""
        sock.listen(1024)
        listener = self.adopt_listener(
            sock, exports, label=label or _label_of(sock), path=path, tls=tls
        )
        self.resume_listening(listener)
        return listener

    def adopt_listener(
        self,
        sock: socket.socket,
        exports: Exports,
        *,
        label: str,
        path: Path | None = None,
        tls: TlsPolicy | None = None,
    ) -> Listener:
        """Own a listening socket without accepting yet; `resume_listening` begins."""
        sock.setblocking(False)
        listener = Listener(sock, exports, tls or self._tls, label, path)
        self.listeners.append(listener)
        return listener

    def stop_listening(self, listener: Listener) -> None:
        """Close one listening socket; its clients stay."""
        self.pause_listening(listener)
        self.listeners.remove(listener)
        if listener.path is not None:
            with contextlib.suppress(OSError):
                listener.path.unlink()
        listener.socket.close()

    def pause_listening(self, listener: Listener) -> None:
        """Leave clients in the socket's queue."""
        if listener.accepting:
            listener.accepting = False
            asyncio.get_running_loop().remove_reader(listener.socket.fileno())

    def resume_listening(self, listener: Listener) -> None:
        """Accept clients (again)."""
        if listener in self.listeners and not listener.accepting and not self._draining:
            listener.accepting = True
            loop = asyncio.get_running_loop()
            loop.add_reader(listener.socket.fileno(), self._accept, listener)

    def serve_socket(self, sock: socket.socket, exports: Exports) -> asyncio.Task[None]:
        """Serve one socket that is already connected; the task ends with the handshake."""
        stream = SocketStream(sock, send_buffer_bytes=self.limits.send_buffer_bytes)
        return self._welcome(stream, exports, self._tls, None)

    def serve_pipes(self, read_fd: int, write_fd: int, exports: Exports) -> asyncio.Task[None]:
        """Serve one client behind two descriptors (stdin and stdout), which must be pollable."""
        return self._welcome(PipeStream(read_fd, write_fd), exports, TlsPolicy(), None)

    # --- clients ---

    def _accept(self, listener: Listener) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _address = listener.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as failure:
                _log.warning(
                    "cannot accept clients for a second: %s", os.strerror(failure.errno or 0)
                )
                self.pause_listening(listener)
                loop = asyncio.get_running_loop()
                loop.call_later(1.0, self.resume_listening, listener)
                return
            full = (
                self.counters.connections >= self.limits.connections
                or listener.clients >= self.limits.connections_per_listener
            )
            if full:
                self.counters.refused += 1
                sock.close()
                continue
            stream = SocketStream(sock, send_buffer_bytes=self.limits.send_buffer_bytes)
            self._welcome(stream, listener.exports, listener.tls, listener)

    def _welcome(
        self, stream: Stream, exports: Exports, tls: TlsPolicy, listener: Listener | None
    ) -> asyncio.Task[None]:
        self.counters.accepted += 1
        self.counters.connections += 1
        if listener is not None:
            listener.clients += 1
        negotiation = Negotiation(
            stream,
            exports,
            tls=tls,
            limits=self.limits,
            scratch=self._scratch,
            shutting_down=lambda: self._draining,
        )
        task = asyncio.get_running_loop().create_task(
            self._shake_hands(negotiation, exports, listener)
        )
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)
        return task

    async def _shake_hands(
        self, negotiation: Negotiation, exports: Exports, listener: Listener | None
    ) -> None:
        agreed = False
        try:
            async with asyncio.timeout(self.limits.handshake_seconds):
                negotiated = await negotiation.run()
            self._connect(negotiated, exports, listener).start()
            agreed = True
        except (ClientGone, TimeoutError):
            self.counters.handshakes_failed += 1
        except ProtocolViolation as violation:
            self.counters.handshakes_failed += 1
            self.counters.violations += 1
            _log.info("closing a client in its handshake: %r", str(violation))
        except Exception:
            self.counters.handshakes_failed += 1
            _log.exception("a handshake failed oddly")
        finally:
            if not agreed:
                negotiation.stream.close()
                self._gone(listener)

    def adopt_connection(
        self, negotiated: Negotiated, listener: Listener, *, skip: int = 0
    ) -> Connection:
        """Own a client that another process negotiated with; `start` it to serve it."""
        self.counters.accepted += 1
        self.counters.connections += 1
        listener.clients += 1
        return self._connect(negotiated, listener.exports, listener, skip=skip)

    def _connect(
        self,
        negotiated: Negotiated,
        exports: Exports,
        listener: Listener | None,
        skip: int = 0,
    ) -> Connection:
        connection = Connection(
            stream=negotiated.stream,
            session=negotiated.session,
            device=negotiated.device,
            limits=self.limits,
            counters=self.counters,
            scratch=self._scratch,
            turn=self._turn,
            on_end=self._ended,
            rest=negotiated.rest,
            skip=skip,
        )
        self.clients[connection] = Client(
            connection, negotiated.name, negotiated.device, exports, listener
        )
        if self._draining:
            connection.refuse_new_requests()
        return connection

    def _ended(self, connection: Connection) -> None:
        client = self.clients.pop(connection)
        self._gone(client.listener)
        task = asyncio.get_running_loop().create_task(self._leave(client))
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _leave(self, client: Client) -> None:
        try:
            await client.exports.leave(client.name, client.device)
        except Exception:
            _log.exception("leaving export %r failed", client.name)

    def _gone(self, listener: Listener | None) -> None:
        self.counters.connections -= 1
        if listener is not None:
            listener.clients -= 1
        self._changed.set()

    def clients_of(self, device: Device) -> list[Connection]:
        """Connections that serve this device now."""
        return [item.connection for item in self.clients.values() if item.device is device]

    async def withdraw(self, device: Device) -> None:
        """End every connection of a device: ESHUTDOWN for new requests, then close."""
        connections = self.clients_of(device)
        await self._drain(connections)

    # --- the end ---

    async def drain(self) -> None:
        """Accept nobody, answer what is in flight, ESHUTDOWN to the rest, then close all."""
        self._draining = True
        for listener in tuple(self.listeners):
            self.stop_listening(listener)
        await self._drain(list(self.clients))
        await self.close()

    async def _drain(self, connections: list[Connection]) -> None:
        for connection in connections:
            connection.refuse_new_requests()
        # Clients get a moment to see ESHUTDOWN and disconnect by themselves.
        deadline = asyncio.get_running_loop().time() + self.limits.drain_seconds
        grace = min(0.2, self.limits.drain_seconds)
        await self._until_gone(connections, asyncio.get_running_loop().time() + grace)
        for connection in connections:
            if connection in self.clients:
                connection.finish()
        await self._until_gone(connections, deadline)
        for connection in connections:
            connection.abort()

    async def _until_gone(self, connections: list[Connection], deadline: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while any(connection in self.clients for connection in connections):
                    self._changed.clear()
                    await self._changed.wait()

    async def close(self) -> None:
        """Close everything now; requests in flight get the drain deadline to end, unanswered."""
        self._draining = True
        for listener in tuple(self.listeners):
            self.stop_listening(listener)
        for task in tuple(self._handshakes):
            task.cancel()
        connections = list(self.clients)
        for connection in connections:
            connection.abort()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        deadline = asyncio.get_running_loop().time() + self.limits.drain_seconds
        await self._until_gone(connections, deadline)
        await asyncio.gather(*self._farewells, return_exceptions=True)

    async def finish_handshakes(self, seconds: float) -> None:
        """Return when no handshake is under way, or after `seconds`."""
        if self._handshakes:
            await asyncio.wait(tuple(self._handshakes), timeout=seconds)

    async def wait_idle(self) -> None:
        """Return when no client is left (a server of one connection ends then)."""
        while self.counters.connections:
            self._changed.clear()
            await self._changed.wait()


def _label_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, tuple):
        return f"{name[0]}:{name[1]}"
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _bind_unix(sock: socket.socket, path: Path) -> None:
    try:
        sock.bind(str(path))
    except OSError as failure:
        if failure.errno != errno.EADDRINUSE:
            raise
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise
        sock.bind(str(path))
