"""When to try again: backoff with jitter, Retry-After, and a budget against retry storms."""

from __future__ import annotations

import random
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from imagecache.errors import Unavailable
from imagecache.store.base import RangePastEnd, Throttled


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long apart; all times in seconds."""

    attempts: int = 6
    base_s: float = 0.05
    cap_s: float = 2.0
    retry_after_cap_s: float = 10.0
    not_found_attempts: int = 3  # a store may answer 404 just after the PUT (catalogue G6)

    def delay_s(self, attempt: int, error: Exception, dice: random.Random) -> float:
        """The wait after the failed `attempt` (from 1): full jitter, at least Retry-After."""
        delay = dice.uniform(0, min(self.cap_s, self.base_s * 2.0**attempt))
        if isinstance(error, Throttled) and error.retry_after is not None:
            delay += min(self.retry_after_cap_s, max(0.0, error.retry_after))
        return delay


class RetryBudget:
    """A token bucket: each first attempt earns `ratio` of a retry, up to `capacity` saved."""

    def __init__(self, *, ratio: float = 0.5, capacity: float = 200.0) -> None:
        self._ratio = ratio
        self._capacity = capacity
        self._tokens = capacity

    def earn(self) -> None:
        """A first attempt was made."""
        self._tokens = min(self._capacity, self._tokens + self._ratio)

    def spend(self) -> bool:
        """True when one more retry is allowed."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def retryable(error: Exception) -> bool:
    """True where the same call may work later; a range past the end never will."""
    return isinstance(error, Unavailable) and not isinstance(error, RangePastEnd)


def parse_retry_after(text: str | None, now_s: float) -> float | None:
    """Seconds of a Retry-After header (a number or an HTTP date), None when absent or malformed."""
    if not text or len(text) > 64:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return None
