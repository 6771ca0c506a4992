"""Shared by the tests of cube: one guest, one root image and one NBD server for all VM tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kits.vm_image import NbdServer, make_erofs, make_tree

from cube.container import ImageDefaults, Overrides
from cube.guest.assets import default_cache
from cube.run import RootExport, RunOutcome, RunSettings, Streams, run_image


@dataclass(frozen=True)
class Ran:
    """What one run gave."""

    outcome: RunOutcome
    stdout: bytes
    stderr: bytes

    @property
    def code(self) -> int:
        return self.outcome.exit.code

    @property
    def text(self) -> str:
        return self.stdout.decode()


Runner = Callable[..., Awaitable[Ran]]


@pytest.fixture(scope="session")
def guest_cache() -> Path:
    """The guest's files; shared with the project, since making them takes a download."""
    return default_cache(os.environ)


@pytest.fixture(scope="session")
def root_export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RootExport]:
    """A busybox root as EROFS, served by nbdkit."""
    directory = tmp_path_factory.mktemp("root")
    image = make_erofs(make_tree(directory / "tree"), directory / "root.erofs")
    server = NbdServer(image, directory / "nbd.sock")
    yield RootExport(server.socket, "", "erofs", ImageDefaults(command=("/bin/sh",)))
    server.stop()


@pytest.fixture
def run_guest(root_export: RootExport, guest_cache: Path) -> Runner:
    """Runs a program in a new VM and collects what it wrote."""

    async def runner(
        *command: str,
        overrides: Overrides | None = None,
        stdin: bytes | None = None,
        seconds: float | None = 240,
        cpus: int = 1,
    ) -> Ran:
        out, err = _Collector(), _Collector()
        feed: tuple[int, int] | None = None
        if stdin is not None:
            feed = os.pipe()
            writer = asyncio.create_task(asyncio.to_thread(_pour, feed[1], stdin))
        try:
            outcome = await run_image(
                root_export,
                overrides or Overrides(command=command),
                RunSettings(cache=guest_cache, seconds=seconds, cpus=cpus),
                Streams(out.write_end, err.write_end, feed[0] if feed else None),
            )
        finally:
            texts = await out.close(), await err.close()
            if feed:
                os.close(feed[0])
                await writer
        return Ran(outcome, *texts)

    return runner


class _Collector:
    """A pipe that is drained by a thread."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        self._reader = asyncio.create_task(asyncio.to_thread(self._drain))

    def _drain(self) -> bytes:
        with os.fdopen(self._read_end, "rb") as file:
            return file.read()

    async def close(self) -> bytes:
        os.close(self.write_end)
        return await self._reader


def _pour(descriptor: int, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), os.fdopen(descriptor, "wb", 0) as file:
        while content:
            content = content[file.write(content) :]
