"""How fast a job goes: bytes, rate and time left, of the job and of each layer. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from imagecache.build.progress import Progress, Stage

MAX_LAYERS = 512
_STEPS = (Stage.PULL, Stage.FLATTEN)


@dataclass(slots=True)
class _Step:
    began: float
    base: int
    done: int
    total: int


class Pace:
    """Collects a job's progress; `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: Progress | None = None
        self._steps: dict[tuple[Stage, int], _Step] = {}

    def note(self, progress: Progress) -> None:
        """Takes one report."""
        self._last = progress
        key = progress.stage, progress.layer
        if progress.stage not in _STEPS or not 0 < progress.layer <= MAX_LAYERS:
            return
        step = self._steps.get(key)
        if step is None or progress.done_bytes < step.done:  # a download may begin anew
            step = _Step(self._clock(), progress.done_bytes, 0, 0)
            self._steps[key] = step
        step.done, step.total = progress.done_bytes, progress.total_bytes

    def as_json(self) -> dict[str, Any] | None:
        """The last report with its rate (bytes a second) and time left (seconds), by layer too."""
        last = self._last
        if last is None:
            return None
        rate, left = self._rate((last.stage, last.layer))
        return {
            "stage": last.stage.value,
            "layer": last.layer,
            "layers": last.layers,
            "done_bytes": last.done_bytes,
            "total_bytes": last.total_bytes,
            "bytes_per_second": rate,
            "seconds_left": left,
            "by_layer": [
                {
                    "layer": layer,
                    "stage": stage.value,
                    "done_bytes": step.done,
                    "total_bytes": step.total,
                    "bytes_per_second": self._rate((stage, layer))[0],
                    "seconds_left": self._rate((stage, layer))[1],
                }
                for (stage, layer), step in sorted(
                    self._steps.items(), key=lambda item: (item[0][1], _STEPS.index(item[0][0]))
                )
            ],
        }

    def _rate(self, key: tuple[Stage, int]) -> tuple[float | None, float | None]:
        step = self._steps.get(key)
        if step is None:
            return None, None
        spent = self._clock() - step.began
        rate = (step.done - step.base) / spent if spent > 0 else 0.0
        if rate <= 0:
            return None, None
        return round(rate, 1), round(max(0, step.total - step.done) / rate, 1)
