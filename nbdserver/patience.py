"""Lingering on a socket: a quick client's next request comes sooner than the loop would wake.

A Patience belongs to one connection, and remembers whether lingering has paid lately.
"""

from collections.abc import Callable
from os import sched_yield
from time import perf_counter

_MOST = 8
_LEAST = 64


class Patience:
    """Asks a socket again for up to `seconds`, and less often where that brings nothing."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._left = _MOST

    def receive(self, receive: Callable[[], int]) -> int:
        """The bytes received, or -1: nothing came, or the socket broke."""
        if self._left <= 0:
            # It did not pay lately; now and then it is tried again.
            self._left -= 1
            if self._left > -_LEAST:
                return -1
            self._left = 1
        until = perf_counter() + self._seconds
        while perf_counter() < until:
            try:
                count = receive()
            except (BlockingIOError, InterruptedError):
                # On a busy host the client may be waiting for this very processor.
                sched_yield()
                continue
            except OSError:
                break
            self._left = min(max(self._left, 0) + 2, _MOST)
            return count
        self._left -= 1
        return -1
