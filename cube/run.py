"""`cubecache run`: one image, one microVM, one program, its streams and its exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from cube.configdisk import GuestConfig
from cube.container import (
    DEFAULT_CAPABILITIES,
    ContainerSpec,
    ImageDefaults,
    Overrides,
    check_hostname,
    compose,
)
from cube.errors import MachineFailed, Overdue
from cube.frames import INPUT_WINDOW
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
    memory_bytes: int = 512 * MIB
    cpus: int = 1
    kernel: Path | None = None
    initrd: Path | None = None
    seconds: float | None = None  # until the program must have ended, from the start of its machine
    hostname: str = ""
    modules: tuple[str, ...] = ()  # further sets of kernel modules (guest.modules.SETS)
    capabilities: int = DEFAULT_CAPABILITIES  # those that root keeps


@dataclass(frozen=True, slots=True)
class Streams:
    """The caller's descriptors that the program's streams are copied to; stdin None = empty."""

    stdout: int = 1
    stderr: int = 2
    stdin: int | None = None


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
    streams: Streams,
) -> RunOutcome:
    """Boots, runs the program, copies its streams, and ends the machine.

    Raises UsageError, LimitExceeded, Unsupported, BootFailed, MachineFailed, Overdue, and
    BrokenPipeError when nobody reads stdout any more.
    """
    hostname = check_hostname(settings.hostname or f"cube-{secrets.token_hex(4)}")
    container = replace(
        compose(root.defaults, overrides, hostname=hostname), capabilities=settings.capabilities
    )
    files = await asyncio.to_thread(
        ensure_guest, settings.cache, kernel=settings.kernel, initrd=settings.initrd
    )
    platform = await choose_platform(settings.cache, files)
    spec = SandboxSpec(
        name=hostname,
        config=replace(
            guest_config(
                container, root.file_system, hostname, wants_stdin=streams.stdin is not None
            ),
            modules=settings.modules,
        ),
        disks=(NbdDisk(ROOT_SERIAL, root.socket, root.export),),
        memory_bytes=settings.memory_bytes,
        cpus=settings.cpus,
    )
    async with boot(QemuDriver(platform), files, spec) as sandbox:
        process = sandbox.link.processes[container.id]
        async with _forwarded_signals(sandbox, process) as stopped_by:
            try:
                async with asyncio.timeout(settings.seconds):
                    ended = await _follow(sandbox, process, streams)
            except TimeoutError as error:
                raise Overdue(
                    f"the program did not end within {settings.seconds:g} seconds",
                    remedy="raise --timeout",
                ) from error
            except MachineFailed:
                if not stopped_by:
                    raise
                ended = ProcessExit(code=128 + stopped_by[0], signal=stopped_by[0])
        return RunOutcome(
            ended,
            tuple(sandbox.timeline),
            {"machine": platform.machine, "accelerator": platform.accelerator},
        )


def guest_config(
    container: ContainerSpec, file_system: str, hostname: str, *, wants_stdin: bool = False
) -> GuestConfig:
    """The configuration of a machine with this one container."""
    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n127.0.1.1\t{hostname}\n"
    placed = replace(container, root_disk=ROOT_SERIAL, root_fs=file_system, wants_stdin=wants_stdin)
    return GuestConfig(containers=(placed,), hostname=hostname, hosts=hosts.encode())


async def _follow(
    sandbox: Sandbox,
    process: GuestProcess,
    streams: Streams,
) -> ProcessExit:
    copies = [
        asyncio.create_task(_copy(process.stdout, streams.stdout)),
        asyncio.create_task(_copy(process.stderr, streams.stderr)),
    ]
    feeding = None
    if streams.stdin is not None:
        feeding = asyncio.create_task(_feed(process, streams.stdin))
    waiting = asyncio.create_task(_exit_of(sandbox, process))
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
        tasks = [waiting, *copies, *([feeding] if feeding else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _exit_of(sandbox: Sandbox, process: GuestProcess) -> ProcessExit:
    await sandbox.booted()
    return await sandbox.exit_of(process)


async def _copy(source: OutputStream, descriptor: int) -> None:
    while received := await source.read():
        await asyncio.to_thread(_write_all, descriptor, received)


async def _feed(process: GuestProcess, descriptor: int) -> None:
    """Copies the caller's stdin to the program, and its end."""
    while content := await _read_ready(descriptor):
        await process.write_input(content)
    await process.end_input()


async def _read_ready(descriptor: int) -> bytes:
    """Bytes of a pipe or terminal once there are some. Never read from a thread: one that waits
    there would keep this process from ending after the program's end.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(descriptor, _settle, ready)
    except PermissionError:
        return os.read(descriptor, INPUT_WINDOW)  # epoll takes no regular file: it is always ready
    try:
        await ready
        return os.read(descriptor, INPUT_WINDOW)
    finally:
        loop.remove_reader(descriptor)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


@contextlib.asynccontextmanager
async def _forwarded_signals(sandbox: Sandbox, process: GuestProcess) -> AsyncIterator[list[int]]:
    """SIGINT and SIGTERM go to the program; again, or before there is one, they end the machine,
    as SIGHUP does. Yields the list of signals that ended it.
    """
    loop = asyncio.get_running_loop()
    forwarded: set[int] = set()
    stopped_by: list[int] = []
    stopping: set[asyncio.Task[None]] = set()

    def handle(number: signal.Signals) -> None:
        ready = process.started.is_set()
        if number == signal.SIGHUP or number in forwarded or not ready:
            stopped_by.append(number)
            stopping.add(asyncio.create_task(sandbox.machine.stop()))
        else:
            forwarded.add(number)
            # A terminal's Ctrl-C reaches the whole foreground group.
            process.signal(number, group=number == signal.SIGINT)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, handle, number)
    try:
        yield stopped_by
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        await asyncio.gather(*stopping, return_exceptions=True)
