"""Running the daemon in the foreground: sockets, signals, readiness, a clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web

from imagecache.composition import open_realm
from imagecache.daemon.access import Tokens
from imagecache.daemon.api import GATE, application
from imagecache.daemon.apisites import ApiSites
from imagecache.daemon.gate import Gate
from imagecache.daemon.handing import Channel
from imagecache.daemon.listening import Sockets, passed_sockets
from imagecache.daemon.logs import set_up_logs
from imagecache.daemon.notify import notify
from imagecache.daemon.service import Service
from imagecache.daemon.takeover import settle_predecessor, take_over_service
from imagecache.daemon.upgrade import Upgrade
from imagecache.errors import CubecacheError
from imagecache.settings import Settings, reloaded

logger = logging.getLogger(__name__)


async def serve(
    settings: Settings,
    announce: Callable[[Service], None],
    *,
    reread: Callable[[], Settings] | None = None,
    until_stdin_closes: bool = False,
    command: Sequence[str] | None = None,
    predecessor: socket.socket | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT (or the end of stdin), then drains and returns.

    `announce` is called once everything answers; `reread` is asked for new settings on SIGHUP.
    `command` starts a daemon like this one: with it, this one can be upgraded. `predecessor` is
    the channel to a daemon that is to hand over (imagecache.daemon.handing).
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    channel = None if predecessor is None else Channel(predecessor)
    passed: list[socket.socket] = []
    if channel is None:
        passed = passed_sockets(os.environ)
        service = await Service.open(settings, passed)
    else:
        opened = await open_realm(settings)
        service, passed = await take_over_service(settings, opened, channel)
    sites = ApiSites(service.sockets if channel is None else Sockets(service.nbd, passed))
    upgrade = Upgrade(service, command=command, api_sockets=sites.listening, done=stop.set)
    watch: asyncio.Task[None] | None = None
    try:
        tokens = await asyncio.to_thread(read_tokens, settings)
        app = application(service, tokens, upgrade)
        runner = sites.runner = web.AppRunner(
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
        if channel is not None:
            await settle_predecessor(service, channel)
        await sites.start(settings)
        if until_stdin_closes:
            loop.add_reader(sys.stdin.fileno(), _at_end_of_stdin, stop)
        announce(service)
        notify(f"READY=1\nSTATUS={len(service.exports())} exports")
        await stop.wait()
        if not service.passed_on:
            notify("STOPPING=1")
        logger.info("handed over" if service.passed_on else "stopping")
    finally:
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        await sites.close(unlink=not service.passed_on)
        await upgrade.close()
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


def _at_end_of_stdin(stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop.set()
