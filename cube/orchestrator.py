"""`Cube`: pods from a program. It talks to the keeper of a state directory, started where none is.

Pods outlive the program. `async with Cube() as cube: pod = await cube.run("pod.yaml")`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from cube.keeper.logfile import LogLine, LogQuery, read_log
from cube.keeper.sets import SetStatus
from cube.keeper.status import PodStatus
from cube.keeperconnection import KeeperConnection
from cube.pod.manifests import Manifests, parse_manifests
from cube.pod.model import DRIVERS, DriverName, Pod, PodSet
from cube.pod.volumes import Policy
from cube.podsession import PodSession
from imagecache.errors import NotFound, Rejected, Unavailable, UsageError
from imagecache.session import Session, Settings

CALL_SECONDS: Final = 120.0
READY_SECONDS: Final = 600.0
_WAIT_SECONDS: Final = 20.0
_START_SECONDS: Final = 60.0
_ANSWER_LIMIT: Final = 64 * 1024 * 1024
_LINE_LIMIT: Final = 4 * 1024 * 1024
_MANIFEST_LIMIT: Final = 4 * 1024 * 1024
_HOST_PATHS: Final = "CUBECACHE_POD_HOST_PATHS"
_DRIVER: Final = "CUBECACHE_POD_DRIVER"


class Cube:
    """The pods of one state directory. Use as an async context manager."""

    def __init__(
        self,
        *,
        state_dir: Path | str | None = None,
        store: str | None = None,
        settings: Settings | None = None,
        policy: Policy | None = None,
        driver: str | None = None,
    ) -> None:
        """Where nothing is given, what configuration and environment say. `driver` (qemu or
        firecracker) is for pods that name none themselves. Raises UsageError.
        """
        if settings is None:
            given = Path(state_dir).absolute() if state_dir is not None else None
            settings = Session(None, given, store).settings
        self._keeper = KeeperConnection(settings)
        self._driver = chosen_driver(driver or os.environ.get(_DRIVER, ""))
        self._policy = policy or host_policy(os.environ.get(_HOST_PATHS, ""))

    async def __aenter__(self) -> Cube:
        await self._keeper.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._keeper.__aexit__()

    async def ensure_keeper(self) -> None:
        """Starts a keeper where none answers, and leaves it running; it starts the daemon."""
        await self._keeper.ensure()

    async def revive(self) -> None:
        """Starts a keeper where none answers although pods are on record; it adopts them."""
        await self._keeper.revive()

    # --- pods

    async def run(
        self,
        manifest: Pod | Path | str | bytes,
        *,
        wait: bool = True,
        seconds: float = READY_SECONDS,
    ) -> PodStatus:
        """Applies a manifest of one pod (a file, its bytes, or a `Pod`); waits until it is ready,
        over or in trouble. Raises Rejected for a manifest with another number of pods.
        """
        if isinstance(manifest, Pod):
            pod = manifest
        else:
            found = await self.read(manifest)
            if len(found.pods) != 1:
                raise Rejected(
                    f"the manifest has {len(found.pods)} pods", remedy="use apply for several"
                )
            pod = found.pods[0]
        status = await self.apply(pod)
        return await self.wait(pod.key, seconds=seconds) if wait else status

    async def read(self, manifest: Path | str | bytes) -> Manifests:
        """A manifest's pods and sets; raises Rejected, LimitExceeded, Denied, NotFound."""
        raw = manifest if isinstance(manifest, bytes) else await asyncio.to_thread(_read, manifest)
        return parse_manifests(raw, self._policy)

    async def apply(self, pod: Pod) -> PodStatus:
        """Makes the pod be as it says, and returns at once; one that is so already stays."""
        await self.ensure_keeper()
        pod = self._driven(pod)
        # No deadline: a pod that is changed ends first, within its grace.
        answer = await self._keeper.call("POST", "/v1/pods", pod.model_dump_json(), seconds=None)
        return _status(answer)

    async def wait(self, key: str, *, seconds: float = READY_SECONDS) -> PodStatus:
        """The pod's status once it is ready, over or in trouble, or when the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(min(_WAIT_SECONDS, deadline - time.monotonic()), 0.001)
            status = _status(
                await self._keeper.call("GET", f"/v1/pods/{key}?settled=1&wait={left}")
            )
            if status.settled or time.monotonic() >= deadline:
                return status

    async def wait_over(self, key: str, *, seconds: float) -> PodStatus:
        """The pod's status once all its containers are over for good, or when the time is up."""
        deadline = time.monotonic() + seconds
        status = await self.get(key)
        while status.phase not in ("Succeeded", "Failed") and time.monotonic() < deadline:
            left = max(min(_WAIT_SECONDS, deadline - time.monotonic()), 0.001)
            path = f"/v1/pods/{key}?since={status.version}&wait={left}"
            status = _status(await self._keeper.call("GET", path))
        return status

    async def get(self, key: str) -> PodStatus:
        """One pod; NotFound."""
        return _status(await self._keeper.call("GET", f"/v1/pods/{key}"))

    async def list(self) -> list[PodStatus]:
        """All pods."""
        answer = await self._keeper.call("GET", "/v1/pods")
        return [PodStatus.model_validate(one) for one in answer["pods"]]

    async def watch(self, *, since: int = -1) -> AsyncIterator[PodStatus]:
        """Pods as they change, what changed after version `since` first; until the caller ends.

        A pod that is deleted is not told. LimitExceeded for too many watchers; Unavailable where no
        keeper answers, or when it ends.
        """
        async with self._keeper.lines_of(f"/v1/watch?since={since}") as lines:
            async for line in lines:
                yield PodStatus.model_validate_json(line)

    async def stop(self, key: str, *, grace_seconds: float | None = None) -> PodStatus:
        """Ends the pod's machine and keeps the pod; `apply` starts it again."""
        path = f"/v1/pods/{key}/stop{_grace(grace_seconds)}"
        return _status(await self._keeper.call("POST", path, seconds=None))

    async def delete(self, key: str, *, grace_seconds: float | None = None) -> PodStatus:
        """Ends a pod and forgets it; returns when its machine is gone."""
        path = f"/v1/pods/{key}{_grace(grace_seconds)}"
        return _status(await self._keeper.call("DELETE", path, seconds=None))

    # --- sets

    async def apply_set(self, wanted: PodSet) -> SetStatus:
        """Makes a set be as it says, and returns at once; its pods follow."""
        await self.ensure_keeper()
        wanted = wanted.model_copy(update={"template": self._driven(wanted.template)})
        return _set(await self._keeper.call("POST", "/v1/sets", wanted.model_dump_json()))

    async def wait_set(self, key: str, *, seconds: float = READY_SECONDS) -> SetStatus:
        """The set's status once all its pods are ready and none is old, or when the time is up."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(min(_WAIT_SECONDS, deadline - time.monotonic()), 0.001)
            status = _set(await self._keeper.call("GET", f"/v1/sets/{key}?wait={left}"))
            if status.settled or time.monotonic() >= deadline:
                return status

    async def sets(self) -> Sequence[SetStatus]:
        """All sets."""
        answer = await self._keeper.call("GET", "/v1/sets")
        return [_set(one) for one in answer["sets"]]

    async def delete_set(self, key: str, *, grace_seconds: float | None = None) -> SetStatus:
        """Forgets a set and deletes its pods; returns when their machines are gone."""
        path = f"/v1/sets/{key}{_grace(grace_seconds)}"
        return _set(await self._keeper.call("DELETE", path, seconds=None))

    # --- looking inside

    async def stats(self, key: str) -> dict[str, Any]:
        """What a pod's machine and containers use now."""
        answer: dict[str, Any] = await self._keeper.call("GET", f"/v1/pods/{key}/stats")
        return answer

    async def orphans(self) -> Sequence[dict[str, str]]:
        """What looks like a pod's and belongs to none."""
        answer: Sequence[dict[str, str]] = (await self._keeper.call("GET", "/v1/orphans"))[
            "orphans"
        ]
        return answer

    async def logs(
        self, key: str, container: str | None = None, query: LogQuery | None = None
    ) -> AsyncIterator[LogLine]:
        """A container's log, the first one's by default; with `follow` until the pod is over."""
        query = query or LogQuery()
        status = await self.get(key)
        chosen = self._container(status, container)
        over = _is_over(status, chosen)
        watching: asyncio.Task[None] | None = None

        async def follow_state() -> None:
            nonlocal over
            while not over:
                with contextlib.suppress(Unavailable):
                    over = _is_over(await self.get(key), chosen)
                await asyncio.sleep(0.5)

        if query.follow:
            watching = asyncio.create_task(_until_gone(follow_state()))
        try:
            directory = Path(status.directory) / "logs" / chosen
            ended = watching.done if watching is not None else lambda: True
            async for line in read_log(directory, query, ended):
                yield line
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def open_exec(
        self,
        key: str,
        arguments: Sequence[str],
        *,
        container: str | None = None,
        environment: Sequence[str] = (),
        user: str = "",
        tty: bool = False,
        stdin: bool = False,
        size: tuple[int, int] = (24, 80),
    ) -> AsyncIterator[PodSession]:
        """A program in a running container, its streams in hand; ended with the context."""
        request = {
            "container": container or "",
            "arguments": [*arguments],
            "environment": [*environment],
            "user": user,
            "tty": tty,
            "stdin": stdin,
            "rows": size[0],
            "columns": size[1],
        }
        async with self._keeper.socket_to(f"/v1/pods/{key}/exec") as session:
            await session.send_text(json.dumps(request))
            yield session

    async def exec(
        self,
        key: str,
        arguments: Sequence[str],
        *,
        container: str | None = None,
        stdin: bytes | None = None,
        limit: int = 16 * 1024 * 1024,
    ) -> tuple[int, bytes, bytes]:
        """Exit status, stdout and stderr of a program in a running container.

        Raises LimitExceeded for more output than `limit`, Unavailable, NotFound.
        """
        async with self.open_exec(
            key, arguments, container=container, stdin=stdin is not None
        ) as session:
            return await session.communicate(stdin, limit=limit)

    @contextlib.asynccontextmanager
    async def connect(self, key: str, port: int) -> AsyncIterator[PodSession]:
        """A TCP connection to a port of the pod, from inside it."""
        async with self._keeper.socket_to(f"/v1/pods/{key}/connect?port={port}") as session:
            yield session

    def _driven(self, pod: Pod) -> Pod:
        if self._driver is None or pod.driver is not None:
            return pod
        return pod.model_copy(update={"driver": self._driver})

    @staticmethod
    def _container(status: PodStatus, name: str | None) -> str:
        if name is None:
            return next(one.name for one in status.containers if not one.init)
        if status.container(name) is None:
            known = ", ".join(one.name for one in status.containers)
            raise NotFound(f"pod {status.key} has no container {name!r}", remedy=f"it has {known}")
        return name


def chosen_driver(name: str) -> DriverName | None:
    """A driver's name, None where none is given; UsageError."""
    found = next((one for one in DRIVERS if one == name), None)
    if name and found is None:
        raise UsageError(f"there is no driver {name!r}", remedy=f"one of {', '.join(DRIVERS)}")
    return found


def host_policy(paths: str) -> Policy:
    """What the operator allows, from a list of directories with colons between."""
    return Policy(host_paths=tuple(path for path in paths.split(":") if path.startswith("/")))


def _read(path: Path | str) -> bytes:
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read(_MANIFEST_LIMIT + 1)
        with Path(path).open("rb") as file:
            return file.read(_MANIFEST_LIMIT + 1)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}") from error


def _status(answer: Any) -> PodStatus:
    return PodStatus.model_validate(answer)


def _set(answer: Any) -> SetStatus:
    return SetStatus.model_validate(answer)


def _grace(seconds: float | None) -> str:
    return "" if seconds is None else f"?grace={seconds:g}"


def _is_over(status: PodStatus, container: str) -> bool:
    one = status.container(container)
    over = status.phase in ("Succeeded", "Failed") or status.terminating
    return over or (one is not None and one.init and one.state == "terminated" and one.code == 0)


async def _until_gone(watching: Any) -> None:
    with contextlib.suppress(NotFound):
        await watching
