"""Passing listening sockets and live plain connections to a new server process.

The old process holds every connection at a request boundary, writes its state down, and passes the
descriptors. Reads in flight are taken back, and asked again by whoever goes on. Nothing is read
from or written to a client until the new process said that it has adopted them. That is the commit
point: before it the old process goes on, after it the new one alone.
TLS clients cannot move (their keys cannot): they are drained and closed.

Wire format, on a unix stream socket: frames of length u32 (big endian), then a JSON object; a
descriptor, where there is one, travels with the length; `tail` bytes follow the JSON.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbdserver.connection import Connection
from nbdserver.exports import Exports
from nbdserver.negotiation import Negotiated, export_facts
from nbdserver.protocol.constants import ExportFlag, ReplyMode
from nbdserver.protocol.session import Session
from nbdserver.server import Client, Listener, Server
from nbdserver.streams import SocketStream

VERSION = 1
_LENGTH = struct.Struct(">I")
_MAX_FRAME = 1 << 20
_MAX_TAIL = 80 << 20


class HandoverError(Exception):
    """The hand-over did not happen: whoever had the clients before still has them."""


@dataclass(frozen=True)
class ConnectionState:
    """One connection at a request boundary, as it is written down.

    `tail` is what was received of requests not yet answered, `skip` how many payload bytes of a
    refused request are still to be dropped.
    """

    label: str
    name: str
    session: Session
    skip: int
    tail: bytes = field(repr=False)

    def encode(self) -> dict[str, Any]:
        """The JSON object; the tail travels after it."""
        session = self.session
        return {
            "kind": "connection",
            "label": self.label,
            "name": self.name,
            "export": session.export,
            "size": session.size,
            "flags": session.flags,
            "mode": int(session.mode),
            "minimum": session.minimum,
            "maximum": session.maximum,
            "contexts": [list(pair) for pair in session.contexts],
            "skip": self.skip,
            "tail": len(self.tail),
        }

    @classmethod
    def decode(cls, frame: dict[str, Any], tail: bytes) -> "ConnectionState":
        """Raises HandoverError for a frame that `encode` did not make."""
        try:
            session = Session(
                export=str(frame["export"]),
                size=int(frame["size"]),
                flags=int(frame["flags"]),
                mode=ReplyMode(frame["mode"]),
                minimum=int(frame["minimum"]),
                maximum=int(frame["maximum"]),
                contexts=tuple((int(number), str(name)) for number, name in frame["contexts"]),
            )
            return cls(str(frame["label"]), str(frame["name"]), session, int(frame["skip"]), tail)
        except (KeyError, TypeError, ValueError) as failure:
            raise HandoverError(f"a malformed connection record: {failure!r}") from failure


class FrameChannel:
    """Frames on a blocking socket with a deadline per call; used in a thread.

    Raises HandoverError for a malformed frame or the end of the stream, OSError.
    """

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        sock.settimeout(seconds)
        self._socket = sock

    def send(self, frame: dict[str, Any], fd: int | None = None, tail: bytes = b"") -> None:
        """One frame, with a descriptor, with bytes behind it."""
        raw = json.dumps(frame).encode()
        head = _LENGTH.pack(len(raw))
        if fd is None:
            self._socket.sendall(head)
        elif socket.send_fds(self._socket, [head], [fd]) != len(head):
            raise HandoverError("the control socket took half a frame")
        self._socket.sendall(raw + tail)

    def receive(self) -> tuple[dict[str, Any], int | None, bytes]:
        """The next frame; its descriptor is the caller's."""
        head, fds, _flags, _address = socket.recv_fds(self._socket, _LENGTH.size, 1)
        fd = fds[0] if fds else None
        try:
            head += self._exactly(_LENGTH.size - len(head))
            (length,) = _LENGTH.unpack(head)
            if length > _MAX_FRAME:
                raise HandoverError(f"a frame of {length} bytes")
            frame = json.loads(self._exactly(length))
            if not isinstance(frame, dict):
                raise HandoverError("a frame that is no object")
            size = frame.get("tail", 0)
            if not isinstance(size, int) or not 0 <= size <= _MAX_TAIL:
                raise HandoverError("a tail of impossible size")
            return frame, fd, self._exactly(size)
        except BaseException:
            if fd is not None:
                os.close(fd)
            raise

    def _exactly(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            piece = self._socket.recv(min(count - len(got), 1 << 20))
            if not piece:
                raise HandoverError("the other process closed the control socket")
            got += piece
        return bytes(got)


# --- the old process ---


async def hand_over(
    server: Server,
    control: socket.socket,
    *,
    on_held: Callable[[], Awaitable[None]] | None = None,
    on_failure: Callable[[], Awaitable[None]] | None = None,
    seconds: float = 10.0,
) -> int:
    """Pass all listeners and plain connections over `control`; the number of clients passed.

    `on_held` runs when nothing is in flight any more (close what only one process may have open),
    `on_failure` before the clients go on here. Afterwards `server` has nothing left and is to be
    closed. Raises HandoverError: nothing has happened, and all clients are served as before.
    """
    for listener in server.listeners:
        server.pause_listening(listener)
    await server.finish_handshakes(seconds)
    moving, staying = _split(server)
    moving, stuck = await _hold(moving, seconds)
    for client in (*staying, *stuck):
        client.connection.refuse_new_requests()
        client.connection.finish()
    try:
        if on_held is not None:
            await on_held()
        moving = [client for client in moving if not client.connection.closed]
        await asyncio.to_thread(_offer, server.listeners, moving, control, seconds)
    except (OSError, HandoverError, ValueError) as failure:
        if on_failure is not None:
            await on_failure()
        for client in moving:
            client.connection.release_hold()
        for listener in server.listeners:
            server.resume_listening(listener)
        raise HandoverError(f"hand-over failed, the clients stay here: {failure}") from failure
    for client in moving:
        client.connection.detach()
        client.connection.stream.close()
    for listener in tuple(server.listeners):
        listener.path = None  # The name in the file system belongs to the new process now.
        server.stop_listening(listener)
    return len(moving)


async def _hold(clients: list[Client], seconds: float) -> tuple[list[Client], list[Client]]:
    """Hold all; those that cannot be held in time (they read no answers) come second."""
    holds = [asyncio.wait_for(client.connection.hold(), seconds / 2) for client in clients]
    results = await asyncio.gather(*holds, return_exceptions=True)
    pairs = list(zip(clients, results, strict=True))
    for client, result in pairs:
        if result is not None:
            client.connection.release_hold()
    return (
        [client for client, result in pairs if result is None],
        [client for client, result in pairs if result is not None],
    )


def _split(server: Server) -> tuple[list[Client], list[Client]]:
    moving: list[Client] = []
    staying: list[Client] = []
    for client in server.clients.values():
        movable = client.listener is not None and isinstance(client.connection.stream, SocketStream)
        (moving if movable else staying).append(client)
    return moving, staying


def _offer(
    listeners: list[Listener], moving: list[Client], control: socket.socket, seconds: float
) -> None:
    channel = FrameChannel(control, seconds)
    channel.send({"kind": "hello", "version": VERSION})
    for listener in listeners:
        path = None if listener.path is None else str(listener.path)
        frame = {"kind": "listener", "label": listener.label, "path": path}
        channel.send(frame, listener.socket.fileno())
    for client in moving:
        connection, listener_of = client.connection, client.listener
        assert listener_of is not None
        state = ConnectionState(
            listener_of.label,
            client.name,
            connection.session,
            connection.skipping,
            connection.unparsed(),
        )
        channel.send(state.encode(), connection.stream.read_fd, state.tail)
    channel.send({"kind": "end", "connections": len(moving)})
    answer, _fd, _tail = channel.receive()
    if answer.get("kind") != "adopted":
        raise HandoverError(f"the new process refused: {answer.get('reason')}")


# --- the new process ---


@dataclass(slots=True)
class _Taken:
    listeners: list[tuple[str, str | None, socket.socket]] = field(default_factory=list)
    connections: list[tuple[ConnectionState, socket.socket]] = field(default_factory=list)

    def close(self) -> None:
        for _label, _path, sock in self.listeners:
            sock.close()
        for _state, sock in self.connections:
            sock.close()


async def take_over(
    server: Server,
    control: socket.socket,
    exports_for: Callable[[str], Exports],
    *,
    before_start: Callable[[], Awaitable[None]] | None = None,
    seconds: float = 10.0,
) -> int:
    """Adopt listeners and connections from the process behind `control`; the number of clients.

    `exports_for` answers the exports of a listener's label (LookupError: unknown); `before_start`
    runs between adopting and serving, and may still refuse (HandoverError). A client whose export
    has another size or other features now is closed. Raises HandoverError: nothing taken.
    """
    taken = _Taken()
    prepared: list[tuple[Connection, Listener]] = []
    try:
        await asyncio.to_thread(_collect, control, taken, seconds)
        listeners = {}
        for label, path, sock in taken.listeners:
            listener = server.adopt_listener(
                sock, exports_for(label), label=label, path=None if path is None else Path(path)
            )
            listeners[label] = listener
        for state, sock in taken.connections:
            listener = listeners[state.label]
            connection = await _prepare(server, state, sock, listener)
            if connection is not None:
                prepared.append((connection, listener))
        channel = FrameChannel(control, seconds)
        await asyncio.to_thread(channel.send, {"kind": "adopted", "connections": len(prepared)})
        if before_start is not None:
            await before_start()
    except (OSError, HandoverError, LookupError, ValueError, TypeError) as failure:
        for connection, _listener in prepared:
            connection.detach()
        for listener in tuple(server.listeners):
            listener.path = None
            server.stop_listening(listener)
        taken.close()
        with contextlib.suppress(OSError):
            refusal = {"kind": "refused", "reason": str(failure)[:500]}
            await asyncio.to_thread(FrameChannel(control, seconds).send, refusal)
        raise HandoverError(f"take-over failed: {failure}") from failure
    for connection, _listener in prepared:
        connection.start()
    for listener in server.listeners:
        server.resume_listening(listener)
    return len(prepared)


def _collect(control: socket.socket, taken: _Taken, seconds: float) -> None:
    channel = FrameChannel(control, seconds)
    hello, _fd, _tail = channel.receive()
    if hello.get("kind") != "hello" or hello.get("version") != VERSION:
        raise HandoverError(f"hand-over format {hello.get('version')!r}, this is {VERSION}")
    while True:
        frame, fd, tail = channel.receive()
        kind = frame.get("kind")
        if kind == "end":
            return
        if fd is None:
            raise HandoverError("a record came without its descriptor")
        sock = socket.socket(fileno=fd)
        if kind == "listener":
            taken.listeners.append((str(frame.get("label")), frame.get("path"), sock))
        elif kind == "connection":
            try:
                taken.connections.append((ConnectionState.decode(frame, tail), sock))
            except BaseException:
                sock.close()
                raise
        else:
            sock.close()
            raise HandoverError(f"an unknown record {kind!r}")


async def _prepare(
    server: Server, state: ConnectionState, sock: socket.socket, listener: Listener
) -> Connection | None:
    """A connection ready to start, or None (and closed): its export is no longer the same."""
    # The document's flags of one session; those of the handshake are not the device's.
    of_the_device = ~(ExportFlag.SEND_DF | ExportFlag.BLOCK_STATUS_PAYLOAD)
    try:
        device = await listener.exports.open(state.name)
    except Exception:
        sock.close()
        return None
    facts = export_facts(state.name, device)
    same = facts.size == state.session.size and (
        facts.flags & of_the_device == state.session.flags & of_the_device
    )
    if not same:
        await listener.exports.leave(state.name, device)
        sock.close()
        return None
    stream = SocketStream(sock, send_buffer_bytes=server.limits.send_buffer_bytes)
    negotiated = Negotiated(stream, state.name, device, state.session, state.tail)
    return server.adopt_connection(negotiated, listener, skip=state.skip)
