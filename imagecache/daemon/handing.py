"""The words that an old and a new daemon exchange while one hands over to the other.

On a unix stream socket, in nbdserver's frames (see nbdserver.handover): the new one says `ready`
(what it is set up for) or closes; the old one stops everything, sends one `socket` frame with a
descriptor per listening socket of the control API, then `frozen` with the descriptor of the
arena's lock; nbdserver's own exchange follows; then the old one says `go`, and closes the channel
when nothing of it writes the state directory any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from imagecache.settings import Settings
from nbdserver.handover import FrameChannel, HandoverError

logger = logging.getLogger(__name__)

PREPARE_SECONDS = 120.0
STEP_SECONDS = 30.0
LINGER_SECONDS = 30.0  # until the old process has ended its API
MAX_SOCKETS = 8
VERSION = 1


def same_place(settings: Settings) -> dict[str, str]:
    """What both must agree on: the exports' data are there."""
    return {
        "state_dir": str(settings.state_dir),
        "store": settings.store_url,
        "realm": settings.realm,
    }


@dataclass(slots=True)
class Frozen:
    """What the old process passes when it has stopped; the descriptors are the receiver's."""

    budget_bytes: int
    lock_fd: int
    sockets: list[socket.socket] = field(default_factory=list)

    def close(self) -> None:
        """Lets go of everything."""
        os.close(self.lock_fd)
        for sock in self.sockets:
            sock.close()


class Channel:
    """One end of the exchange. Every call ends within its seconds; HandoverError else."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    async def send(
        self, kind: str, fields: Mapping[str, Any] | None = None, *, fd: int | None = None
    ) -> None:
        """One frame."""
        frame = {**(fields or {}), "kind": kind}
        await self._call(lambda frames: frames.send(frame, fd), STEP_SECONDS)

    async def receive(self, *kinds: str, seconds: float) -> tuple[dict[str, Any], int | None]:
        """The next frame, which has to be of one of the kinds; its descriptor is the caller's."""
        frame, fd, _tail = await self._call(lambda frames: frames.receive(), seconds)
        if frame.get("kind") in kinds:
            return frame, fd
        if fd is not None:
            os.close(fd)
        raise HandoverError(f"the other process said {str(frame.get('kind'))[:100]!r}")

    async def _call(self, work: Any, seconds: float) -> Any:
        try:
            return await asyncio.to_thread(work, FrameChannel(self.socket, seconds))
        except TimeoutError as error:
            raise HandoverError("the other process did not answer in time") from error
        except (OSError, ValueError) as error:
            raise HandoverError(f"the other process is gone: {error}") from error

    async def receive_frozen(self) -> Frozen:
        """The old process's descriptors."""
        sockets: list[socket.socket] = []
        try:
            while True:
                frame, fd = await self.receive("socket", "frozen", seconds=PREPARE_SECONDS)
                if fd is None or len(sockets) > MAX_SOCKETS:
                    raise HandoverError("a frame came without its descriptor")
                if frame["kind"] == "frozen":
                    return Frozen(int(frame["budget_bytes"]), fd, sockets)
                sockets.append(socket.socket(fileno=fd))
        except BaseException:
            for sock in sockets:
                sock.close()
            raise

    async def wait_closed(self) -> None:
        """Returns when the other process has closed its end, or after a while."""
        try:
            await self.receive("bye", seconds=LINGER_SECONDS)
        except HandoverError as error:
            logger.debug("the old process is gone: %s", error)
        self.socket.close()
