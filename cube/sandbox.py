"""A microVM with its containers running: the core that `run` and pods stand on.

A Sandbox owns one machine, its private directory, its channel and the tasks that serve them, from
`boot` to the end of the `async with`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from cube import configdisk
from cube.configdisk import GuestConfig, encode_config
from cube.errors import BootFailed, MachineFailed, Overdue
from cube.frames import FrameType
from cube.guest.assets import GuestFiles
from cube.link import GuestLink, GuestProcess, ProcessExit
from cube.vm.seam import Disk, Driver, FileDisk, Machine, MachineSpec
from imagecache.errors import NoSpace, Rejected

BOOT_SECONDS: Final = 180.0  # emulated machines on a busy host are slow
_POWER_OFF_SECONDS: Final = 10.0
_PREFIX: Final = "cubecache-vm-"


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    """What to boot. `disks` are the containers' roots; the configuration disk is added."""

    name: str
    config: GuestConfig
    disks: Sequence[Disk]
    memory_bytes: int
    cpus: int


class Sandbox:
    """A booting or running machine and the processes its configuration names."""

    def __init__(self, machine: Machine, link: GuestLink, started: float) -> None:
        self.started = started
        self.machine = machine
        self.link = link
        self._serving = asyncio.create_task(link.serve())
        self._machine_end = asyncio.create_task(machine.wait())

    @property
    def timeline(self) -> list[tuple[str, float]]:
        """Names and seconds since QEMU was started, in order; a container's marks by name only."""
        marks = sorted(self.link.marks, key=lambda mark: mark.at)
        return [(mark.name, round(mark.at - self.started, 4)) for mark in marks]

    async def booted(self, *, seconds: float = BOOT_SECONDS) -> None:
        """Returns when the agent has said hello; raises BootFailed."""
        await self._first(self.link.greeted, seconds=seconds, booting=True)

    async def exit_of(self, process: GuestProcess, *, seconds: float | None = None) -> ProcessExit:
        """How the process ended; raises MachineFailed when its machine ended first, Overdue."""
        await self._first(process.exited, seconds=seconds, booting=False)
        return process.exited.result()

    async def power_off(self) -> None:
        """Lets the guest flush its disks and power off; what does not is killed by the owner."""
        self.link.send(FrameType.SHUTDOWN)
        await asyncio.wait({self._machine_end}, timeout=_POWER_OFF_SECONDS)

    async def close(self) -> None:
        """Ends machine and tasks."""
        await self.machine.stop()
        for task in (self._serving, self._machine_end):
            task.cancel()
        await asyncio.gather(self._serving, self._machine_end, return_exceptions=True)

    async def _first(
        self,
        wanted: asyncio.Future[None] | asyncio.Future[ProcessExit],
        *,
        seconds: float | None,
        booting: bool,
    ) -> None:
        done, _ = await asyncio.wait(
            {wanted, self._serving},
            timeout=seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if wanted.done() and not wanted.cancelled():
            return
        if not done:
            kind, what = (BootFailed, "boot") if booting else (Overdue, "finish")
            raise kind(
                f"the machine did not {what} within {seconds:g} seconds",
                console=self.machine.last_words(),
            )
        raise await self._diagnosis(booting=booting)

    async def _diagnosis(self, *, booting: bool) -> MachineFailed:
        """The channel has closed: waits for the machine's end and says what is known."""
        error = self._serving.exception()
        if isinstance(error, Rejected):
            return MachineFailed(error.message, remedy=error.remedy)
        await asyncio.wait({self._machine_end}, timeout=_POWER_OFF_SECONDS)
        status = self._machine_end.result() if self._machine_end.done() else None
        words = self.machine.last_words()
        if self.link.failure:
            return BootFailed(f"the guest could not start: {self.link.failure}", console=words)
        if status is None:
            how = "closed its channel"
        elif status < 0:
            how = f"was killed by signal {-status}"
        elif status > 0:
            how = f"ended with status {status}"
        else:
            how = "powered off by itself"
        if booting:
            return BootFailed(f"the machine {how} before it had booted", console=words)
        return MachineFailed(f"the machine {how} while its program ran", console=words)


@contextlib.asynccontextmanager
async def boot(
    driver: Driver,
    files: GuestFiles,
    spec: SandboxSpec,
    *,
    clock_ns: Callable[[], int] = time.time_ns,
) -> AsyncIterator[Sandbox]:
    """Starts a machine; on leaving, machine, sockets and directory are gone, whatever happened.

    Raises BootFailed, LimitExceeded, UsageError, Unsupported, NoSpace.
    """
    directory, lock = await asyncio.to_thread(_make_directory)
    try:
        config = replace(spec.config, clock_ns=clock_ns())
        disk = directory / "config.img"
        await asyncio.to_thread(_write_private, disk, encode_config(config))
        started = time.monotonic()
        machine = await driver.start(
            MachineSpec(
                name=spec.name,
                kernel=files.kernel,
                initrd=files.initrd,
                disks=(FileDisk(configdisk.SERIAL, disk), *spec.disks),
                directory=directory,
                memory_bytes=spec.memory_bytes,
                cpus=spec.cpus,
                tsc_khz=files.tsc_khz,
            )
        )
        link = GuestLink(machine.reader, machine.writer)
        for container in spec.config.containers:
            link.add_process(container.id)
        sandbox = Sandbox(machine, link, started)
        try:
            yield sandbox
            if not all(disk.read_only for disk in spec.disks):
                await sandbox.power_off()
        finally:
            await asyncio.shield(sandbox.close())
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        lock.close()


def _make_directory() -> tuple[Path, BinaryIO]:
    """A private directory and the lock that says its owner lives."""
    try:
        _sweep(Path(tempfile.gettempdir()))
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = (directory / "lock.new").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Named only now: a sweeper never sees a lock that is not held.
        (directory / "lock.new").rename(directory / "lock")
    except OSError as error:
        raise NoSpace(f"no directory for the machine: {error}") from error
    return directory, lock


def _sweep(parent: Path) -> None:
    """Removes directories of machines whose owner was killed: nobody holds their locks."""
    for directory in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = directory.lstat()
            if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
                continue
            with (directory / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)


def _write_private(path: Path, content: bytes) -> None:
    # The configuration holds the container's environment: nobody else's to read.
    try:
        path.touch(mode=0o600)
        path.write_bytes(content)
    except OSError as error:
        raise NoSpace(f"the machine's configuration cannot be written: {error}") from error
