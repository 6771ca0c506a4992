"""Running the daemon in the foreground: sockets, signals, readiness, a clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable

from aiohttp import web

from imagecache.daemon.api import application
from imagecache.daemon.logs import set_up_logs
from imagecache.daemon.service import Service
from imagecache.errors import CubecacheError, Unavailable
from imagecache.settings import Settings, reloaded

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
    if reread is not None:
        loop.add_signal_handler(signal.SIGHUP, _reload, service, reread)
    runner = web.AppRunner(application(service), access_log=None, handle_signals=False)
    try:
        await runner.setup()
        await _listen(runner, settings)
        if until_stdin_closes:
            loop.add_reader(sys.stdin.fileno(), _at_end_of_stdin, stop)
        announce(service)
        await stop.wait()
        logger.info("stopping")
    finally:
        await runner.cleanup()
        settings.control_socket.unlink(missing_ok=True)
        await service.close()


def _reload(service: Service, reread: Callable[[], Settings]) -> None:
    try:
        fresh = reread()
    except CubecacheError as error:
        logger.error("the configuration stays as it was: %s", error)
        return
    service.settings, taken, left = reloaded(service.settings, fresh)
    set_up_logs(service.settings.log)
    logger.info("configuration read again; taken: %s", ", ".join(taken) or "nothing")
    if left:
        logger.warning("needs a restart: %s", ", ".join(left))


async def _listen(runner: web.AppRunner, settings: Settings) -> None:
    # The arena's lock is ours by now, so whoever left a socket here is gone.
    path = settings.control_socket
    previous = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        await web.UnixSite(runner, str(path)).start()
    except OSError as error:
        raise Unavailable(f"cannot listen on {path}: {error.strerror or error}") from error
    finally:
        os.umask(previous)


def _at_end_of_stdin(stop: asyncio.Event) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        stop.set()
