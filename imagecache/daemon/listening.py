"""Listening sockets of the daemon: its own, a service manager's, or a predecessor's.

A socket that a service manager passed (LISTEN_FDS) is used instead of a new one, and is never
unlinked. Sockets made here are given to the manager's descriptor store, so that clients that come
while a killed daemon is started again wait in the queue.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping
from pathlib import Path

from imagecache.daemon.notify import notify
from imagecache.errors import Unavailable, UsageError
from nbdserver.activation import activated_sockets
from nbdserver.exports import Exports
from nbdserver.server import Listener, Server

logger = logging.getLogger(__name__)

SUN_PATH = 107


class Sockets:
    """The sockets that were passed to this process, and those that its NBD server listens on."""

    def __init__(self, nbd: Server, passed: list[socket.socket] | None = None) -> None:
        """`passed` are listening sockets; what nobody asks for is closed by `close_rest`."""
        self._nbd = nbd
        self._passed: dict[str, socket.socket] = {}
        for sock in passed or []:
            twice = self._passed.setdefault(_place(sock), sock)
            if twice is not sock:  # by its unit and from the store: one and the same
                sock.close()

    def take(self, place: str) -> socket.socket | None:
        """The passed socket that is bound there (a path, or HOST:PORT), once."""
        return self._passed.pop(place, None)

    def listen_unix(self, path: Path, view: Exports) -> Listener:
        """Serves exports on a unix socket; Unavailable, UsageError."""
        if len(os.fsencode(path)) > SUN_PATH:
            raise UsageError(f"socket path {path} is longer than {SUN_PATH} bytes")
        passed = self.take(str(path))
        try:
            if passed is not None:
                return self._nbd.listen_socket(passed, view, label=str(path))
            listener = self._nbd.listen_unix(path, view)
        except OSError as error:
            raise Unavailable(f"cannot listen on {path}: {error.strerror or error}") from error
        store(listener.socket, str(path))
        return listener

    def listen_tcp(self, place: str, view: Exports) -> Listener:
        """Serves exports on HOST:PORT; Unavailable."""
        passed = self.take(place)
        host, _, port = place.rpartition(":")
        try:
            if passed is not None:
                return self._nbd.listen_socket(passed, view, label=place)
            return self._nbd.listen_tcp(host.strip("[]"), int(port), view)
        except (OSError, OverflowError) as error:
            raise Unavailable(f"cannot listen on {place}: {error}") from error

    def stop(self, listener: Listener) -> None:
        """Ends one listener; its clients stay."""
        notify(f"FDSTOREREMOVE=1\nFDNAME={stored_name(listener.label)}")
        self._nbd.stop_listening(listener)

    def close_rest(self) -> None:
        """Closes what was passed and nobody asked for."""
        for place, sock in self._passed.items():
            logger.warning("the passed socket %s is not one of ours", place)
            notify(f"FDSTOREREMOVE=1\nFDNAME={stored_name(place)}")
            sock.close()
        self._passed.clear()


def passed_sockets(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """The stream sockets that the service manager passed to this process; UsageError."""
    try:
        found = activated_sockets(environment)
    except (OSError, ValueError) as error:
        raise UsageError(f"the passed sockets cannot be used: {error}") from error
    return [sock for _name, sock in found]


def store(sock: socket.socket, place: str) -> None:
    """Gives a listening socket to the service manager's descriptor store, if it has one."""
    notify(f"FDSTORE=1\nFDNAME={stored_name(place)}", fds=(sock.fileno(),))


def stored_name(place: str) -> str:
    """A name for the descriptor store: at most 255 characters, no colon."""
    return place.replace(":", "_").replace("\n", "_")[-255:]


def _place(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, tuple):
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{host}:{name[1]}"
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)
