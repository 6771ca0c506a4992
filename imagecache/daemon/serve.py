"""Running the daemon in the foreground: sockets, signals, readiness, a clean end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import shutil
import signal
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from imagecache.daemon.access import Tokens
from imagecache.daemon.api import GATE, application
from imagecache.daemon.gate import Gate
from imagecache.daemon.logs import set_up_logs
from imagecache.daemon.notify import notify
from imagecache.daemon.service import Service
from imagecache.errors import CubecacheError, Unavailable, UsageError
from imagecache.settings import ApiSection, Settings, reloaded

logger = logging.getLogger(__name__)


async def serve(
    settings: Settings,
    announce: Callable[[Service], None],
    *,
    reread: Callable[[], Settings] | None = None,
    until_stdin_closes: bool = False,
) -> None:
    """Serves until SIGTERM or SIGINT (or the end of stdin), then drains and returns.

    `announce` is called once everything answers; `reread` is asked for new settings on SIGHUP.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    service = await Service.open(settings)
    runner: web.AppRunner | None = None
    watch: asyncio.Task[None] | None = None
    try:
        tokens = await asyncio.to_thread(read_tokens, settings)
        app = application(service, tokens)
        runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=75,
            auto_decompress=False,
            shutdown_timeout=2,
        )
        if reread is not None:
            loop.add_signal_handler(signal.SIGHUP, _reload, service, app[GATE], reread)
        await runner.setup()
        assert runner.server is not None
        watch = asyncio.create_task(app[GATE].watch(runner.server))
        await _listen(runner, settings)
        await _listen_tcp(runner, settings.api)
        if until_stdin_closes:
            loop.add_reader(sys.stdin.fileno(), _at_end_of_stdin, stop)
        announce(service)
        notify(f"READY=1\nSTATUS={len(service.exports())} exports")
        await stop.wait()
        notify("STOPPING=1")
        logger.info("stopping")
    finally:
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if runner is not None:
            await runner.cleanup()
        settings.control_socket.unlink(missing_ok=True)
        await service.close()


def read_tokens(settings: Settings) -> Tokens:
    """The configured tokens; none where no file is. Blocking."""
    return Tokens.read(Path(settings.api.tokens)) if settings.api.tokens else Tokens()


def _reload(service: Service, gate: Gate, reread: Callable[[], Settings]) -> None:
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        fresh = reread()
        gate.tokens = read_tokens(fresh)
    except CubecacheError as error:
        logger.error("the configuration stays as it was: %s", error)
        notify("READY=1")
        return
    service.settings, taken, left = reloaded(service.settings, fresh)
    set_up_logs(service.settings.log)
    logger.info("configuration read again; taken: %s", ", ".join(taken) or "nothing")
    if left:
        logger.warning("needs a restart: %s", ", ".join(left))
    notify("READY=1")


async def _listen(runner: web.AppRunner, settings: Settings) -> None:
    # The arena's lock is ours by now, so whoever left a socket here is gone.
    path, group = settings.control_socket, settings.api.socket_group
    previous = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        await web.UnixSite(runner, str(path)).start()
        if group:
            shutil.chown(path, group=group)
            path.chmod(0o660)
            # To pass through, not to list; what else is in there has modes of its own.
            shutil.chown(path.parent, group=group)
            path.parent.chmod(0o710)
    except (OSError, LookupError) as error:
        raise Unavailable(f"cannot listen on {path}: {error}") from error
    finally:
        os.umask(previous)


async def _listen_tcp(runner: web.AppRunner, section: ApiSection) -> None:
    if section.tcp is None:
        return
    host, _, port = section.tcp.rpartition(":")
    host = host.strip("[]")
    context = None
    if section.tls_certificate and section.tls_key:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(section.tls_certificate, section.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise Unavailable(f"certificate {section.tls_certificate}: {error}") from error
    elif not _is_loopback(host):
        raise UsageError(
            f"api.tcp = {section.tcp!r} would send tokens in the clear",
            remedy="set api.tls_certificate and api.tls_key, or listen on 127.0.0.1",
        )
    try:
        site = web.TCPSite(runner, host, int(port), ssl_context=context)
        await site.start()
    except (OSError, OverflowError) as error:
        raise Unavailable(f"cannot listen on {section.tcp}: {error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _at_end_of_stdin(stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop.set()
