"""The client for programs without an event loop: the same calls, each returning when it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from imagecache.composition import ImageRequest
from imagecache.settings import Settings
from preload.client import Client, ExportHandle, OnProgress, connect, connect_url

T = TypeVar("T")


class BlockingClient:
    """As `preload.client.Client`, from one thread; made by `connect_blocking`."""

    def __init__(self, runner: asyncio.Runner, client: Client) -> None:
        self._runner = runner
        self._client = client

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(call)

    def submit(
        self,
        requests: Sequence[ImageRequest],
        *,
        priority: int = 0,
        pin_seconds: int = 0,
        limit_bytes_per_second: int = 0,
        warm: str | None = None,
    ) -> list[dict[str, Any]]:
        """Queues preloads and returns their jobs' JSON objects; as `Client.submit`."""
        return self._run(
            self._client.submit(
                requests,
                priority=priority,
                pin_seconds=pin_seconds,
                limit_bytes_per_second=limit_bytes_per_second,
                warm=warm,
            )
        )

    def wait(self, job: dict[str, Any], on_progress: OnProgress = lambda _: None) -> dict[str, Any]:
        """A job's result, once it is done; raises what it failed with."""
        return self._run(self._client.wait(job, on_progress))

    def preload(
        self, request: ImageRequest, on_progress: OnProgress = lambda _: None
    ) -> dict[str, Any]:
        """Preloads one image and returns its result."""
        return self._run(self._client.preload(request, on_progress))

    def plan(self, requests: Sequence[ImageRequest]) -> list[dict[str, Any]]:
        """What preloads would do; changes nothing."""
        return self._run(self._client.plan(requests))

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that the daemon remembers, oldest first."""
        return self._run(self._client.jobs())

    def cancel(self, identity: str) -> dict[str, Any]:
        """Cancels a job; what it downloaded stays."""
        return self._run(self._client.cancel(identity))

    def pause(self, identity: str) -> dict[str, Any]:
        """Stops a job until `resume`."""
        return self._run(self._client.pause(identity))

    def resume(self, identity: str) -> dict[str, Any]:
        """Queues a paused job again."""
        return self._run(self._client.resume(identity))

    def export(
        self,
        image: str,
        *,
        socket: Path | None = None,
        name: str | None = None,
        fill: str | None = None,
        writable: bool = False,
        face: str = "erofs",
    ) -> ExportHandle:
        """Exports an image, preloading it first if nobody has."""
        return self._run(
            self._client.export(
                image, socket=socket, name=name, fill=fill, writable=writable, face=face
            )
        )

    def exports(self) -> list[dict[str, Any]]:
        """All exports of the daemon."""
        return self._run(self._client.exports())

    def unexport(self, name: str, *, force: bool = False) -> None:
        """Ends an export; Busy while a client is attached, unless forced."""
        self._run(self._client.unexport(name, force=force))


@contextmanager
def connect_blocking(settings: Settings, *, start: bool = True) -> Iterator[BlockingClient]:
    """A client of the state directory's daemon; with `start`, of a temporary one if none runs."""
    with _running(connect(settings, start=start)) as client:
        yield client


@contextmanager
def connect_url_blocking(
    url: str, *, token: str | None = None, ca_file: Path | None = None
) -> Iterator[BlockingClient]:
    """A client of a daemon elsewhere; as `preload.client.connect_url`."""
    with _running(connect_url(url, token=token, ca_file=ca_file)) as client:
        yield client


@contextmanager
def _running(connecting: AbstractAsyncContextManager[Client]) -> Iterator[BlockingClient]:
    with asyncio.Runner() as runner:
        client = runner.run(connecting.__aenter__())
        try:
            yield BlockingClient(runner, client)
        finally:
            runner.run(connecting.__aexit__(None, None, None))
