"""When a container is started again. Pure: the clock comes in.

The rule is UCloud's (question/restart_policy.md): the first restart at once, then after 10, 20,
40 ... at most 300 seconds; ten minutes without trouble begin the count anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cube.pod.model import RestartPolicy

FIRST_SECONDS: Final = 10.0
LONGEST_SECONDS: Final = 300.0
HEALTHY_SECONDS: Final = 600.0


@dataclass(slots=True)
class BackOff:
    """The count of one container's restarts."""

    count: int = 0

    def next_delay(self, ran_seconds: float) -> float:
        """Seconds to wait before the next start, after a run of this length."""
        if ran_seconds >= HEALTHY_SECONDS:
            self.count = 0
        self.count += 1
        if self.count == 1:
            return 0.0
        return float(min(FIRST_SECONDS * 2 ** min(self.count - 2, 30), LONGEST_SECONDS))


def wants_restart(policy: RestartPolicy, code: int, *, init: bool) -> bool:
    """Whether a container that ended so is started again; an init container only after failure."""
    if policy is RestartPolicy.NEVER:
        return False
    if policy is RestartPolicy.ON_FAILURE or init:
        return code != 0
    return True
