"""What a build tells while it works, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Stage(StrEnum):
    """The steps of a build, in order."""

    RESOLVE = "resolve"
    PULL = "pull"
    FLATTEN = "flatten"
    STORE = "store"
    COMMIT = "commit"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one stage of one layer is; totals are 0 where nobody knows them. Bytes."""

    stage: Stage
    layer: int  # from 1; 0: the whole image
    layers: int
    done_bytes: int = 0
    total_bytes: int = 0


Report = Callable[[Progress], None]


class StageTimes:
    """Seconds of wall clock by stage, added up; stages overlap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Adds the time of the body."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started


@dataclass(slots=True)
class BuildResult:
    """One image's build; sizes in bytes, times in seconds of wall clock."""

    name: str
    image: str
    block_image: str
    size_bytes: int
    chunks: int
    new_chunks: int = 0
    stored_bytes: int = 0
    layers: int = 0
    new_layers: int = 0
    downloaded_bytes: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The object that `preload --json` prints."""
        return {name: getattr(self, name) for name in self.__slots__}
