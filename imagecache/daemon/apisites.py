"""Where the control API listens: the state directory's socket, and TCP where it is configured."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import shutil
import socket
import ssl
from pathlib import Path

from aiohttp import web

from imagecache.daemon.listening import Sockets, store
from imagecache.errors import Unavailable, UsageError
from imagecache.settings import ApiSection, Settings

BACKLOG = 1024


class ApiSites:
    """The API's listening sockets; `runner` is set before `start`."""

    def __init__(self, sockets: Sockets) -> None:
        """`sockets` has those that were passed to this process."""
        self.runner: web.AppRunner | None = None
        self._sockets = sockets
        self._listening: list[socket.socket] = []
        self._path: Path | None = None

    def listening(self) -> list[socket.socket]:
        """What a successor is passed."""
        return list(self._listening)

    async def start(self, settings: Settings) -> None:
        """Listens on everything that is configured; Unavailable, UsageError."""
        path = settings.control_socket
        control = self._sockets.take(str(path))
        if control is None:
            control = await asyncio.to_thread(_control_socket, path, settings.api.socket_group)
            store(control, str(path))
            self._path = path
        await self._serve(control, None)
        if settings.api.tcp:
            context = _tls_context(settings.api)
            tcp = self._sockets.take(settings.api.tcp) or _tcp_socket(settings.api.tcp)
            await self._serve(tcp, context)
        self._sockets.close_rest()

    async def _serve(self, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        assert self.runner is not None
        # asyncio closes what it serves; ours is kept, to be passed on.
        self._listening.append(sock)
        await web.SockSite(self.runner, sock.dup(), ssl_context=context, backlog=BACKLOG).start()

    async def close(self, *, unlink: bool) -> None:
        """Answers what is asked already, then lets go; `unlink`: nobody listens any more."""
        if self.runner is not None:
            await self.runner.cleanup()
        for sock in self._listening:
            sock.close()
        if unlink and self._path is not None:
            self._path.unlink(missing_ok=True)


def _control_socket(path: Path, group: str | None) -> socket.socket:
    # The arena's lock is ours by now, so whoever left a socket here is gone.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        sock.bind(str(path))
        if group:
            shutil.chown(path, group=group)
            path.chmod(0o660)
            # To pass through, not to list; what else is in there has modes of its own.
            shutil.chown(path.parent, group=group)
            path.parent.chmod(0o710)
        sock.listen(BACKLOG)
    except (OSError, LookupError) as error:
        sock.close()
        raise Unavailable(f"cannot listen on {path}: {error}") from error
    finally:
        os.umask(previous)
    return sock


def _tls_context(section: ApiSection) -> ssl.SSLContext | None:
    if section.tls_certificate and section.tls_key:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(section.tls_certificate, section.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise Unavailable(f"certificate {section.tls_certificate}: {error}") from error
        return context
    if not _is_loopback(str(section.tcp).rpartition(":")[0].strip("[]")):
        raise UsageError(
            f"api.tcp = {section.tcp!r} would send tokens in the clear",
            remedy="set api.tls_certificate and api.tls_key, or listen on 127.0.0.1",
        )
    return None


def _tcp_socket(place: str) -> socket.socket:
    host, _, port = place.rpartition(":")
    try:
        return socket.create_server(
            (host.strip("[]"), int(port)),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=BACKLOG,
        )
    except (OSError, OverflowError) as error:
        raise Unavailable(f"cannot listen on {place}: {error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
