"""Which clients have something to be read: one epoll for all connections of a loop, below the loop.

The event loop watches this one descriptor, and whoever is ready is called from here. That costs a
fraction of what the loop's own turn costs for each event.
"""

import asyncio
import contextlib
import select
from collections.abc import Callable

_MOST_EVENTS = 64
_ROUNDS = 4


class Readiness:
    """Calls back, on the running loop, while a watched descriptor can be read."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._callbacks: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Begin to call back for `fd`, which is not watched."""
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._ready)
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Call back no more. Must come before `fd` is closed."""
        del self._callbacks[fd]
        if self._epoll is None:
            return
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        if not self._callbacks:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _ready(self) -> None:
        for _ in range(_ROUNDS):
            if self._epoll is None:
                return
            events = self._epoll.poll(0, _MOST_EVENTS)
            for fd, _mask in events:
                # One of those before may have ended it.
                callback = self._callbacks.get(fd)
                if callback is not None:
                    callback()
            if not events or len(events) == _MOST_EVENTS:
                return
