"""The states of generations, read from the names of their markers. Pure.

A state is a marker object of its own and the furthest one holds, so a state only moves forward,
even where a process that was frozen for a day writes an earlier marker again. `closing` is the
last part of retired: still readable, but nobody may newly rely on it, so that the collector's last
look at who relies on what stays true until it writes `expired`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from imagecache.errors import Denied, Unsupported

_MARKER = re.compile(r"(\d{8})\.([a-z]+)\.json")
SEALED = "sealed.json"
"""Stands among the markers of a sealed realm, so that nobody takes it for one in the clear."""


class State(IntEnum):
    """How far a generation is; it never goes back."""

    ACTIVE = 0
    RETIRED = 1
    CLOSING = 2
    EXPIRED = 3
    DELETED = 4

    @property
    def word(self) -> str:
        """The state as keys and records name it."""
        return self.name.lower()

    @property
    def readable(self) -> bool:
        """Whether reads may happen under a generation in this state."""
        return self < State.EXPIRED


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation; `times` are the store's seconds of each marker that is there."""

    number: int
    state: State
    times: tuple[tuple[State, float], ...]

    @property
    def readable(self) -> bool:
        """Whether reads may happen under it."""
        return self.state.readable

    def since(self, state: State) -> float | None:
        """When a state was reached, by the store's clock; None without its marker."""
        return dict(self.times).get(state)


def parse_generations(prefix: str, markers: Iterable[tuple[str, float]]) -> list[Generation]:
    """The generations behind (key, modified) of all markers, by number.

    Raises Unsupported for a marker that this version does not know: guessing would be deleting;
    and Denied where the realm is sealed and the caller has not got its secrets.
    """
    words = {state.word: state for state in State}
    found: dict[int, dict[State, float]] = {}
    for key, modified in markers:
        if key == f"{prefix}{SEALED}":
            raise Denied(
                f"the realm of {prefix} is sealed and no secrets are configured",
                remedy="set [encryption] secrets to where its secrets are",
            )
        name = _MARKER.fullmatch(key.removeprefix(prefix))
        if name is None or name[2] not in words:
            raise Unsupported(f"generation marker {key} is unknown", remedy="upgrade cubecache")
        found.setdefault(int(name[1]), {})[words[name[2]]] = modified
    return [
        Generation(number, max(times), tuple(sorted(times.items())))
        for number, times in sorted(found.items())
    ]
