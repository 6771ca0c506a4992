"""Whether writes through the page cache are quick now, told by how long the last ones took.

Where the kernel makes writers wait for the disk, a write on the event loop would stop every client.
"""

import resource
from time import monotonic

QUICK_WRITE = 1 << 20
_SLOW_SECONDS = 0.05
_WATCH_SECONDS = 2.0


class WritePace:
    """Of one file: `begin` before a write on the loop, `end` after it."""

    def __init__(self) -> None:
        self._slow_until = 0.0
        self._watch_until = 0.0
        self._began = 0.0
        self._slept = -1

    @property
    def slow(self) -> bool:
        """Writes wait for the disk: do them in threads."""
        return monotonic() < self._slow_until

    def begin(self, length: int) -> bool:
        """Whether a write of `length` bytes may be done on the loop; `end` follows then."""
        now = monotonic()
        if length > QUICK_WRITE or now < self._slow_until:
            return False
        self._began = now
        self._slept = _times_slept() if now < self._watch_until else -1
        return True

    def end(self) -> None:
        """The write is done, or has failed."""
        took = monotonic() - self._began
        if took > _SLOW_SECONDS:
            if self._slept < 0:
                # Either the disk, or only a busy processor: the next slow one tells.
                self._watch_until = self._began + took + _WATCH_SECONDS
            elif _times_slept() > self._slept:
                self._slow_until = self._began + min(20 * took, 1.0)


def _times_slept() -> int:
    """How often this thread gave the processor up to wait; to be pushed off it does not count."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
