"""What a pod is doing, as it is recorded, listed and watched. JSON in and out. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from cube.pod.model import Pod

PENDING: Final = "Pending"
CREATING: Final = "ContainerCreating"
RUNNING: Final = "Running"
COMPLETED: Final = "Completed"
ERROR: Final = "Error"
OUT_OF_MEMORY: Final = "OOMKilled"
CRASH_LOOP: Final = "CrashLoopBackOff"
PULL_ERROR: Final = "ErrImagePull"
PULL_BACK_OFF: Final = "ImagePullBackOff"
CREATE_ERROR: Final = "CreateContainerError"
TERMINATING: Final = "Terminating"
_PROBLEMS: Final = (PULL_ERROR, PULL_BACK_OFF, CREATE_ERROR, CRASH_LOOP)
MESSAGE_LIMIT: Final = 2000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LastEnd(_Part):
    """How a container's previous run ended."""

    code: int
    signal: int = 0
    reason: str = ""
    finished: float = 0.0


class ContainerStatus(_Part):
    """One container. Times in seconds since 1970, 0 is never."""

    name: str
    init: bool = False
    image: str = ""
    block_image: str = ""
    state: Literal["waiting", "running", "terminated"] = "waiting"
    reason: str = PENDING
    message: str = ""
    code: int = 0
    signal: int = 0
    started: float = 0.0
    finished: float = 0.0
    restarts: int = 0
    ready: bool = False
    last: LastEnd | None = None


class PodStatus(_Part):
    """A pod. `state` is the one word that lists show, `phase` Kubernetes' coarser one."""

    key: str
    uid: str
    created: float
    version: int = 0  # grows with every change in the keeper
    phase: Literal["Pending", "Running", "Succeeded", "Failed"] = "Pending"
    state: str = PENDING
    message: str = ""
    terminating: bool = False
    failed: bool = False  # as a whole: an init container failed for good, or its time was up
    address: str = ""
    host_address: str = "127.0.0.1"
    containers: list[ContainerStatus] = []
    machine: dict[str, str | int] = {}
    timeline: dict[str, float] = {}  # seconds from the request of the last start
    directory: str = ""
    labels: dict[str, str] = {}

    def container(self, name: str) -> ContainerStatus | None:
        """The status of one container by name."""
        return next((one for one in self.containers if one.name == name), None)

    def settle(self) -> None:
        """Derives phase and state from the containers."""
        main = [one for one in self.containers if not one.init]
        self.phase = "Failed" if self.failed else _phase(main)
        self.state = TERMINATING if self.terminating else _state(self.containers, main, self.phase)

    @property
    def ready(self) -> bool:
        """Whether every container runs and has passed its readiness probe."""
        main = [one for one in self.containers if not one.init]
        return not self.terminating and all(one.ready for one in main)

    @property
    def settled(self) -> bool:
        """Whether a starter need not wait any longer: it is ready, over, or in trouble."""
        return self.ready or self.phase in ("Succeeded", "Failed") or self.state in _PROBLEMS


def first_status(pod: Pod, uid: str, created: float) -> PodStatus:
    """The status of a pod nobody has started yet."""
    containers = [
        ContainerStatus(name=one.name, image=one.image, init=True) for one in pod.init_containers
    ]
    containers += [ContainerStatus(name=one.name, image=one.image) for one in pod.containers]
    return PodStatus(
        key=pod.key, uid=uid, created=created, containers=containers, labels=pod.labels
    )


def _phase(
    main: Iterable[ContainerStatus],
) -> Literal["Pending", "Running", "Succeeded", "Failed"]:
    main = list(main)
    if all(one.state == "terminated" for one in main):
        return "Succeeded" if all(one.code == 0 for one in main) else "Failed"
    started = any(one.state == "running" or one.restarts or one.last for one in main)
    return "Running" if started else "Pending"


def _state(every: Iterable[ContainerStatus], main: Iterable[ContainerStatus], phase: str) -> str:
    every, main = list(every), list(main)
    for one in every:
        if one.state == "waiting" and one.reason in _PROBLEMS:
            return one.reason
    if phase == "Succeeded":
        return COMPLETED
    if phase == "Failed":
        return ERROR
    if phase == "Running":
        return RUNNING
    first = [one for one in every if one.init]
    done = sum(one.state == "terminated" and one.code == 0 for one in first)
    if first and done < len(first) and any(one.reason != PENDING for one in first):
        return f"Init:{done}/{len(first)}" if any(one.started for one in first) else CREATING
    return CREATING if any(one.reason == CREATING for one in every) else PENDING
