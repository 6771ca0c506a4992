"""The new daemon's side of an upgrade: prepare, look, adopt, and only then own.

Until the old process has said `go`, nothing here writes: the arena is looked at, nothing is
fetched, no job runs. Whatever fails before that leaves the old process as it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket

from imagecache.cache.arena import Arena
from imagecache.daemon.attachments import ImageMaps
from imagecache.daemon.exports import ExportView
from imagecache.daemon.exporttable import ExportRecord, ExportTable
from imagecache.daemon.handing import STEP_SECONDS, Channel, Frozen, same_place
from imagecache.daemon.service import Service, arena_settings
from imagecache.errors import CubecacheError, Unavailable
from imagecache.settings import Settings
from imagecache.store.opened import OpenedStore
from nbdserver.handover import HandoverError, take_over

logger = logging.getLogger(__name__)


async def take_over_service(
    settings: Settings, opened: OpenedStore, channel: Channel
) -> tuple[Service, list[socket.socket]]:
    """The old process's service, going on here, and its control API's listening sockets.

    Raises Unavailable: the old process goes on. Jobs do not run yet (`Service.begin_jobs`).
    """
    maps = ImageMaps.of(settings, opened)
    frozen: Frozen | None = None
    service: Service | None = None
    try:
        table = ExportTable(settings.state_dir / "exports.db")
        await _prepare_maps(maps, await asyncio.to_thread(table.load))
        await channel.send("ready", same_place(settings))
        frozen = await channel.receive_frozen()
        budget = frozen.budget_bytes
        if settings.cache.budget_bytes != budget:
            logger.warning("cache.budget_bytes is taken at the next restart")
            cache = dataclasses.replace(settings.cache, budget_bytes=budget)
            settings = dataclasses.replace(settings, cache=cache)
        arena = await Arena.look(settings.state_dir / "arena", arena_settings(settings))
        service = Service(settings, opened, arena, maps=maps)
        for record in await service.kept():
            await _open(service, record)
        clients = await take_over(
            service.nbd,
            channel.socket,
            lambda label: _view(service, label),
            before_start=lambda: _told_to_go(channel),
            seconds=STEP_SECONDS,
        )
        await arena.claim(frozen.lock_fd, settings.state_dir / "arena")
    except (CubecacheError, HandoverError) as error:
        if frozen is not None:
            frozen.close()
        if service is not None:
            service.arena.let_go()
            await service.close()
        else:
            await opened.close()
        raise error if isinstance(error, CubecacheError) else Unavailable(str(error)) from error
    logger.info("took over %d exports and %d clients", len(service.exports()), clients)
    _begin(service)
    return service, frozen.sockets


async def _prepare_maps(maps: ImageMaps, records: list[ExportRecord]) -> None:
    """Reads what is needed of each image, while the old process still serves."""
    for record in records:
        try:
            await maps.get(record)
        except CubecacheError as error:
            logger.warning("export %s: %s", record.name, error)


async def _open(service: Service, record: ExportRecord) -> None:
    export = service.restored(record)
    try:
        await service.attachments.open(export)
    except CubecacheError as error:
        export.failure = str(error)
        logger.warning("export %s cannot be restored: %s", record.name, error)


def _begin(service: Service) -> None:
    listeners = {listener.label: listener for listener in service.nbd.listeners}
    for export in service.exports():
        export.listener = listeners.get(export.record.socket or "")
        if export.device is not None:
            service.attachments.begin(export)
    service.holding.start()
    service.ready = True


def _view(service: Service, label: str) -> ExportView:
    """The exports of a listener, which is known by where it listens."""
    for export in service.exports():
        if export.record.socket == label:
            return service.view_of(export.record.name)
    return service.shared_view


async def _told_to_go(channel: Channel) -> None:
    """Returns when the old process has let go, by word or by its end."""
    try:
        await channel.receive("go", seconds=STEP_SECONDS)
    except HandoverError as error:
        if not _ended(channel.socket):
            raise
        logger.warning("the old process ended without a word: %s", error)


def _ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


async def settle_predecessor(service: Service, channel: Channel) -> None:
    """Waits for the old process's API to end, then runs jobs."""
    await channel.wait_closed()
    await asyncio.shield(service.begin_jobs())
