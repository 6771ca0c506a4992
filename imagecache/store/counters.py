"""What a store was asked: control calls, and reads per source and class; cheap to read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from imagecache.buckets import Buckets
from imagecache.store.base import Priority


@dataclass(slots=True)
class ClassCounters:
    """One class of reads from one source; only ever growing.

    `requests` counts every attempt that was sent, retries and hedges included; `hedges` those that
    were sent beside a slow one, `hedges_won` those that were the first to answer; `throttled` the
    errors that were a request to slow down; `seconds` the time of all attempts, `times` that of
    each, `waited_seconds` the time in the queue for a place.
    """

    requests: int = 0
    bytes: int = 0
    errors: int = 0
    throttled: int = 0
    retries: int = 0
    hedges: int = 0
    hedges_won: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    times: Buckets = field(default_factory=Buckets)


@dataclass(slots=True)
class CallCounters:
    """One control call; only ever growing.

    `requests` counts every attempt, `errors` those that failed (an absent object is an answer),
    `bytes` the bodies that were read or written from memory, `times` how long each attempt took.
    """

    requests: int = 0
    bytes: int = 0
    errors: int = 0
    throttled: int = 0
    times: Buckets = field(default_factory=Buckets)


CALLS = ("get", "put", "stat", "list", "delete")


def _calls() -> dict[str, CallCounters]:
    return {call: CallCounters() for call in CALLS}


def _classes() -> tuple[ClassCounters, ...]:
    return tuple(ClassCounters() for _ in Priority)


@dataclass(slots=True)
class ReadCounters:
    """All sources of one opened store; index the tuples with a Priority."""

    origin: tuple[ClassCounters, ...] = field(default_factory=_classes)
    tier: tuple[ClassCounters, ...] = field(default_factory=_classes)
    tier_fallbacks: int = 0  # reads that the tier could not answer and the origin was asked for
    condemned: int = 0  # reads whose bytes did not match their digest
    control: dict[str, CallCounters] = field(default_factory=_calls)  # by call

    def snapshot(self) -> dict[str, object]:
        """A copy as JSON-ready nested dicts: source -> class name -> counter."""
        return {
            **{
                name: {priority.name.lower(): asdict(classes[priority]) for priority in Priority}
                for name, classes in (("origin", self.origin), ("tier", self.tier))
            },
            "tier_fallbacks": self.tier_fallbacks,
            "condemned": self.condemned,
            "control": {call: asdict(counters) for call, counters in self.control.items()},
        }
