"""`cubecache run`: one image, one microVM, one program, its streams and its exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cube.configdisk import GuestConfig
from cube.container import ContainerSpec, ImageDefaults, Overrides, check_hostname, compose
from cube.errors import MachineFailed
from cube.guest.assets import ensure_guest
from cube.link import GuestProcess, OutputStream, ProcessExit
from cube.sandbox import Sandbox, SandboxSpec, boot
from cube.vm.platform import choose_platform
from cube.vm.qemu import QemuDriver
from cube.vm.seam import MIB, NbdDisk

ROOT_SERIAL: Final = "root-1"
_DRAIN_SECONDS: Final = 5.0  # what was printed before a machine died is still shown


@dataclass(frozen=True, slots=True)
class RootExport:
    """An image's export: where its disk is served, and what the image wants to run."""

    socket: Path
    export: str
    file_system: str
    defaults: ImageDefaults


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How to run. `cache` keeps the guest's files; None for kernel and initrd means our own."""

    cache: Path
    memory_bytes: int = 256 * MIB
    cpus: int = 1
    kernel: Path | None = None
    initrd: Path | None = None
    seconds: float | None = None  # for the program, from the machine's start
    hostname: str = ""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended, and its timeline in seconds since the machine was started."""

    exit: ProcessExit
    timeline: tuple[tuple[str, float], ...]
    machine: Mapping[str, str] = field(default_factory=dict)


async def run_image(
    root: RootExport,
    overrides: Overrides,
    settings: RunSettings,
    *,
    stdout: int,
    stderr: int,
) -> RunOutcome:
    """Boots, runs the program, copies its output to two descriptors, and ends the machine.

    Raises UsageError, LimitExceeded, Unsupported, BootFailed, MachineFailed, Overdue, and
    BrokenPipeError when nobody reads stdout any more.
    """
    hostname = check_hostname(settings.hostname or f"cube-{secrets.token_hex(4)}")
    container = compose(root.defaults, overrides, hostname=hostname)
    files = await asyncio.to_thread(
        ensure_guest, settings.cache, kernel=settings.kernel, initrd=settings.initrd
    )
    platform = await choose_platform(settings.cache, files)
    spec = SandboxSpec(
        name=hostname,
        config=guest_config(container, root.file_system, hostname),
        disks=(NbdDisk(ROOT_SERIAL, root.socket, root.export),),
        memory_bytes=settings.memory_bytes,
        cpus=settings.cpus,
    )
    async with boot(QemuDriver(platform), files, spec) as sandbox:
        process = sandbox.link.processes[container.id]
        async with _forwarded_signals(sandbox, process):
            ended = await _follow(sandbox, process, settings, stdout=stdout, stderr=stderr)
        await sandbox.power_off()
        return RunOutcome(
            ended,
            tuple(sandbox.timeline),
            {"machine": platform.machine, "accelerator": platform.accelerator},
        )


def guest_config(container: ContainerSpec, file_system: str, hostname: str) -> GuestConfig:
    """The configuration of a machine with this one container."""
    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n127.0.1.1\t{hostname}\n"
    placed = ContainerSpec(
        arguments=container.arguments,
        environment=container.environment,
        user=container.user,
        working_directory=container.working_directory,
        root_disk=ROOT_SERIAL,
        root_fs=file_system,
    )
    return GuestConfig(containers=(placed,), hostname=hostname, hosts=hosts.encode())


async def _follow(
    sandbox: Sandbox,
    process: GuestProcess,
    settings: RunSettings,
    *,
    stdout: int,
    stderr: int,
) -> ProcessExit:
    copies = [
        asyncio.create_task(_copy(process.stdout, stdout)),
        asyncio.create_task(_copy(process.stderr, stderr)),
    ]
    waiting = asyncio.create_task(_exit_of(sandbox, process, settings.seconds))
    try:
        # A copy ends early only by failing: then there is no use in waiting for the program.
        await asyncio.wait({waiting, *copies}, return_when=asyncio.FIRST_EXCEPTION)
        if not waiting.done():
            await asyncio.gather(*copies)
        try:
            ended = await waiting
        except MachineFailed:
            await asyncio.wait(copies, timeout=_DRAIN_SECONDS)
            raise
        await asyncio.gather(*copies)
        return ended
    finally:
        for task in (waiting, *copies):
            task.cancel()
        await asyncio.gather(waiting, *copies, return_exceptions=True)


async def _exit_of(sandbox: Sandbox, process: GuestProcess, seconds: float | None) -> ProcessExit:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await sandbox.booted()
    left = None if seconds is None else max(0.0, seconds - (loop.time() - begun))
    return await sandbox.exit_of(process, seconds=left)


async def _copy(source: OutputStream, descriptor: int) -> None:
    while received := await source.read():
        await asyncio.to_thread(_write_all, descriptor, received)


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


@contextlib.asynccontextmanager
async def _forwarded_signals(sandbox: Sandbox, process: GuestProcess) -> AsyncIterator[None]:
    """SIGINT and SIGTERM go to the program; the same one again ends the machine."""
    loop = asyncio.get_running_loop()
    received: set[int] = set()
    stopping: set[asyncio.Task[None]] = set()

    def forward(number: int) -> Callable[[], None]:
        def handler() -> None:
            if number in received or not sandbox.link.greeted.done():
                stopping.add(asyncio.create_task(sandbox.machine.stop()))
                return
            received.add(number)
            process.signal(number, group=number == signal.SIGINT)

        return handler

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, forward(number))
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        await asyncio.gather(*stopping, return_exceptions=True)
