"""When a download is too slow, and when it has had its chances: pure, the clock is given."""

from __future__ import annotations

from collections import deque


class ThroughputFloor:
    """A sliding window over received bytes; it spans connections, so that reconnecting is no way
    round it."""

    def __init__(self, *, window_seconds: float, bytes_per_second: int, now: float) -> None:
        self._window = window_seconds
        self._need = bytes_per_second * window_seconds
        self._marks: deque[tuple[float, int]] = deque([(now, 0)])
        self._total = 0

    def restart(self, now: float) -> None:
        """Begin a new window, after a wait that was our own choice."""
        self._marks = deque([(now, self._total)])

    def note(self, count: int, now: float) -> None:
        """Count bytes that arrived; marks lie at least a 64th of the window apart."""
        self._total += count
        if now - self._marks[-1][0] >= self._window / 64:
            self._marks.append((now, self._total))

    def too_slow(self, now: float) -> bool:
        """Whether a whole window has passed with fewer bytes than the floor asks for."""
        while len(self._marks) > 1 and self._marks[1][0] <= now - self._window:
            self._marks.popleft()
        began, base = self._marks[0]
        return now - began >= self._window and self._total - base < self._need


class Patience:
    """Counts attempts in a row that brought the download no further than it had ever been."""

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._high = 0
        self.failures = 0

    def failed(self, reached: int) -> bool:
        """Note a failed attempt that reached `reached` bytes; True when no chance is left."""
        if reached > self._high:
            self._high = reached
            self.failures = 0
            return False
        self.failures += 1
        return self.failures >= self._attempts
