"""The old daemon's side of an upgrade: start the new version, stop at a boundary, hand over.

The new version is this daemon's own command line, started again from what is on disk now. Where it
does not start, does not get ready or refuses, it is killed, and everything goes on here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from imagecache.daemon.exports import LiveExport
from imagecache.daemon.handing import PREPARE_SECONDS, STEP_SECONDS, Channel, same_place
from imagecache.daemon.notify import notify
from imagecache.daemon.service import Service
from imagecache.errors import Busy, CubecacheError, Unavailable, Unsupported
from nbdserver.handover import HandoverError, hand_over
from nbdserver.overlay import OverlayDevice, OverlayError

logger = logging.getLogger(__name__)

_MANAGERS = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class Upgrade:
    """What `POST /v1/upgrade` does; one at a time."""

    def __init__(
        self,
        service: Service,
        *,
        command: Sequence[str] | None = None,
        api_sockets: Callable[[], list[socket.socket]] = list,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """`command` starts a daemon like this one; `done` is called once it has taken over."""
        self._service = service
        self._command = command
        self._api_sockets = api_sockets
        self._done = done
        self._task: asyncio.Task[int] | None = None
        self._channel: Channel | None = None
        self._undo: list[Callable[[], Awaitable[None] | None]] = []

    async def run(self) -> dict[str, Any]:
        """The new daemon's pid, once it serves; what the old one then does is end.

        Raises Busy (an upgrade goes on, an export is not stored yet), Unsupported, Unavailable
        with the reason: then nothing has changed.
        """
        if self._command is None:
            raise Unsupported(
                "this daemon was not started by a command that can be started again",
                remedy="start it by `cubecache serve`",
            )
        if self._task is not None:
            raise Busy("an upgrade goes on already")
        self._task = asyncio.create_task(self._upgrade(self._command), name="upgrade")
        try:
            pid = await asyncio.shield(self._task)
        finally:
            if self._task.done() and not self._service.passed_on:
                self._task = None
        return {"pid": pid}

    async def close(self) -> None:
        """Ends what goes on; after a take-over, tells the new process that nothing writes here."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._channel is not None:
            self._channel.socket.close()

    async def _upgrade(self, command: Sequence[str]) -> int:
        ours, theirs = socket.socketpair()
        process: subprocess.Popen[bytes] | None = None
        self._channel = Channel(ours)
        try:
            with theirs:
                process = await asyncio.to_thread(_spawn, command, theirs)
            await self._ready(process, self._channel)
            await self._hand_over(process, self._channel)
        except (CubecacheError, HandoverError) as error:
            logger.error("the upgrade failed, this daemon goes on: %s", error)
            if isinstance(error, CubecacheError):
                raise
            raise Unavailable(f"the upgrade failed: {error}") from error
        finally:
            if not self._service.passed_on:
                if process is not None:
                    await asyncio.to_thread(_end, process)
                ours.close()
                self._channel = None
        logger.info("process %d has taken over", process.pid)
        self._done()
        return process.pid

    async def _ready(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        try:
            frame, _ = await channel.receive("ready", seconds=PREPARE_SECONDS)
        except HandoverError as error:
            status = process.poll()
            how = "is not ready" if status is None else f"ended with status {status}"
            raise Unavailable(
                f"the new version {how}: {error}", remedy="see the daemon's log"
            ) from error
        for name, value in same_place(self._service.settings).items():
            if frame.get(name) != value:
                raise Unavailable(
                    f"the new version's {name} is {str(frame.get(name))[:200]!r}, not {value!r}",
                    remedy="an upgrade keeps them; restart the daemon to change them",
                )

    async def _hand_over(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        service = self._service
        async with service.changing:
            waiting = [export.record.name for export in service.exports() if not export.stored]
            if waiting:
                raise Busy(f"export {waiting[0]} is not stored yet", remedy="wait for its preload")

            async def held() -> None:
                try:
                    await self._freeze(channel)
                except (CubecacheError, OverlayError) as error:
                    raise HandoverError(str(error)) from error

            async def failed() -> None:
                await asyncio.to_thread(_end, process)
                await self._thaw()

            await hand_over(
                service.nbd,
                channel.socket,
                on_held=held,
                on_failure=failed,
                seconds=STEP_SECONDS,
            )
            service.passed_on = True
            service.arena.let_go()
        # Before the new process may say that it is ready: only the main process is believed.
        notify(f"MAINPID={process.pid}")
        try:
            await channel.send("go")
        except HandoverError as error:
            logger.error("the new process died at once: %s", error)

    async def _freeze(self, channel: Channel) -> None:
        service, undo = self._service, self._undo
        undo.append(service.jobs.go_on)
        await service.jobs.suspend()
        for export in service.exports():
            if export.overlay is not None:
                await export.overlay.suspend()
                undo.append(partial(_resume, export, export.overlay))
        await service.arena.freeze()
        undo.append(service.arena.thaw)
        for sock in self._api_sockets():
            await channel.send("socket", fd=sock.fileno())
        budget = service.arena.settings.budget_bytes
        await channel.send("frozen", {"budget_bytes": budget}, fd=service.arena.lock_fd)

    async def _thaw(self) -> None:
        while self._undo:
            outcome = self._undo.pop()()
            if outcome is not None:
                await outcome


async def _resume(export: LiveExport, overlay: OverlayDevice) -> None:
    try:
        await overlay.resume()
    except (OverlayError, OSError) as error:
        export.failure = f"its overlay is lost: {error}"
        logger.error("export %s: %s", export.record.name, export.failure)


def _spawn(command: Sequence[str], channel: socket.socket) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k not in _MANAGERS}
    fd = channel.fileno()
    try:
        return subprocess.Popen([*command, "--take-over", str(fd)], pass_fds=(fd,), env=environment)
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be started: {error.strerror}") from error


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
