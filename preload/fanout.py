"""One preload on several hosts: each daemon has its own job, and is asked by its own API.

A host that fails, or does not answer, costs the others nothing; what became of each is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagecache.composition import ImageRequest
from imagecache.errors import CubecacheError, Denied, UsageError, as_record
from preload.client import Client, connect_url

MAX_HOSTS = 256
AT_ONCE = 32


@dataclass(slots=True)
class HostOutcome:
    """One image on one host: its result, or what it failed with."""

    host: str
    image: str
    result: dict[str, Any] | None = None
    error: CubecacheError | None = None

    def as_json(self) -> dict[str, Any]:
        """What `preload --on --json` prints for it."""
        error = None if self.error is None else as_record(self.error)
        return {"host": self.host, "image": self.image, "result": self.result, "error": error}


@dataclass(slots=True)
class MergedProgress:
    """All hosts' progress as one: bytes of the running steps, and jobs that have ended."""

    jobs: int
    ended: int = 0
    _steps: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def note(self, host: str, job: Mapping[str, Any]) -> None:
        """Takes one job's JSON object."""
        progress = job["progress"]
        if progress is not None:
            self._steps[host, job["image"]] = progress["done_bytes"], progress["total_bytes"]

    def end(self, host: str, image: str) -> None:
        """One job is over."""
        self.ended += 1
        self._steps.pop((host, image), None)

    @property
    def done_bytes(self) -> int:
        """Of what is under way."""
        return sum(done for done, _ in self._steps.values())

    @property
    def total_bytes(self) -> int:
        """Of what is under way."""
        return sum(total for _, total in self._steps.values())


@dataclass(frozen=True, slots=True)
class Order:
    """What every host is asked for; the fields are those of `Client.submit`."""

    requests: Sequence[ImageRequest]
    priority: int = 0
    pin_seconds: int = 0
    limit_bytes_per_second: int = 0
    warm: str | None = None

    async def submit(self, client: Client) -> list[dict[str, Any]]:
        """The jobs of one daemon."""
        return await client.submit(
            self.requests,
            priority=self.priority,
            pin_seconds=self.pin_seconds,
            limit_bytes_per_second=self.limit_bytes_per_second,
            warm=self.warm,
        )


def read_token(path: Path) -> str:
    """The token in a file; Denied. Blocking."""
    try:
        with path.open() as file:
            return file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Denied(f"token file {path} cannot be read: {error}") from error


async def preload_on(
    urls: Sequence[str],
    order: Order,
    *,
    token: str | None = None,
    ca_file: Path | None = None,
    on_progress: Callable[[MergedProgress], None] = lambda _: None,
) -> list[HostOutcome]:
    """Preloads on every host, side by side; one outcome per host and image, in order.

    Raises UsageError for a malformed URL; everything else is in the outcomes.
    """
    if not urls or len(urls) > MAX_HOSTS or len(set(urls)) != len(urls):
        raise UsageError(f"{len(urls)} hosts", remedy=f"name 1 to {MAX_HOSTS}, each once")
    progress = MergedProgress(len(urls) * len(order.requests))
    turn = asyncio.Semaphore(AT_ONCE)
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(connect_url(url, token=token, ca_file=ca_file))
            for url in urls
        ]

        async def one(client: Client) -> list[HostOutcome]:
            async with turn:
                return await _on_host(client, order, progress, on_progress)

        found = await asyncio.gather(*(one(client) for client in clients))
    return [outcome for outcomes in found for outcome in outcomes]


async def _on_host(
    client: Client,
    order: Order,
    progress: MergedProgress,
    on_progress: Callable[[MergedProgress], None],
) -> list[HostOutcome]:
    outcomes = [HostOutcome(client.place, request.reference) for request in order.requests]
    try:
        jobs = await order.submit(client)
    except CubecacheError as error:
        for outcome in outcomes:
            outcome.error = error
            progress.end(client.place, outcome.image)
        on_progress(progress)
        return outcomes

    def note(job: dict[str, Any]) -> None:
        progress.note(client.place, job)
        on_progress(progress)

    for outcome, job in zip(outcomes, jobs, strict=True):
        try:
            outcome.result = await client.wait(job, note)
        except CubecacheError as error:
            outcome.error = error
        progress.end(client.place, job["image"])
        on_progress(progress)
    return outcomes
