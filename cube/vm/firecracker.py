"""The Firecracker driver: one process per machine, told by its API socket, its agent over vsock.

Disks over NBD reach it through a qemu-storage-daemon (`cube.vm.bridge`). Firecracker does not
connect to one anew, so a machine whose bridge ends is ended too. Needs KVM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

from cube.channel.vsock import connect_vsock
from cube.errors import BootFailed, MachineFailed
from cube.vm.adopted import AdoptedMachine
from cube.vm.bridge import PROGRAM as BRIDGE
from cube.vm.bridge import Bridge, start_bridge
from cube.vm.firecracker_adopted import (
    API_NAME,
    adopt_firecracker,
    clear_left_behind,
    reached,
    record_jail,
    remove,
)
from cube.vm.firecracker_api import FirecrackerApi
from cube.vm.firecracker_config import (
    CTRL_ALT_DEL,
    LOG_NAME,
    METRICS_NAME,
    START,
    VSOCK_NAME,
    BootFiles,
    Request,
    bridged_disks,
    check_firecracker_spec,
    requests,
)
from cube.vm.jailer import Jail, Jailer, jail_name
from cube.vm.kernel_image import elf_kernel
from cube.vm.pipes import LinePipe
from cube.vm.qemu import emulator_version
from cube.vm.seam import MachineSpec, VhostUserDisk
from cube.vm.tail import Tail
from cube.vm.tie import tie
from imagecache.errors import CubecacheError, Unsupported, UsageError

_SETTLE_SECONDS: Final = 1.0
_METRICS_LIMIT: Final = 1024 * 1024
T = TypeVar("T")


class FirecrackerMachine:
    """A running Firecracker; see `cube.vm.seam.Machine`. Owned by who called the driver's `start`.

    `closing` holds everything that is undone by `stop`, in the order in which it was made.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def __init__(self, home: Path, closing: contextlib.AsyncExitStack) -> None:
        self.console = Tail()
        self.complaints = Tail()
        self.version = ""
        self._home = home
        self._closing = closing
        self._metrics = b""
        self._stopping: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def process_id(self) -> int:
        """The Firecracker process."""
        return self._running.pid

    @property
    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise MachineFailed("the machine has no process")
        return self._process

    @property
    def metrics(self) -> dict[str, Any]:
        """What Firecracker flushed last; empty before, and where metrics were not asked for."""
        for line in reversed(self._metrics.split(b"\n")[:-1]):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                return found if isinstance(found, dict) else {}
        return {}

    async def wait(self) -> int:
        """Firecracker's exit status (negative: the signal that ended it), its output read."""
        status = await self._running.wait()
        await asyncio.wait(self._tasks[:2], timeout=_SETTLE_SECONDS)
        return status

    async def stop(self) -> None:
        """Kills Firecracker and its bridge, and removes sockets, pipes and jail."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._closing.aclose())
        await asyncio.shield(self._stopping)

    def last_words(self) -> list[str]:
        """Firecracker's complaints, then the guest's console."""
        return [*self.complaints.lines(), *self.console.lines()]

    async def press_ctrl_alt_del(self) -> None:
        """Asks the guest for an orderly end, as a keyboard does; raises BootFailed."""
        request = Request("/actions", dict(CTRL_ALT_DEL), "Ctrl-Alt-Del")
        with reached(self._home) as home:
            async with FirecrackerApi(home / API_NAME) as api:
                await api.put(request)

    # --- used by the driver

    def feed_metrics(self, received: bytes) -> None:
        """Keeps the last lines."""
        self._metrics = (self._metrics + received)[-_METRICS_LIMIT:]

    async def run(self, words: list[str], *, dies_with_owner: bool) -> None:
        """Starts the process; raises BootFailed."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *tie(dies_with_owner=dies_with_owner),
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=self._home,
                start_new_session=True,
            )
        except OSError as error:
            raise BootFailed(f"Firecracker cannot be started: {error}") from error
        self._tasks = [
            asyncio.create_task(_collect(self._process.stdout, self.console)),
            asyncio.create_task(_collect(self._process.stderr, self.complaints)),
        ]
        self._closing.push_async_callback(self._end)

    def guard(self, bridge: Bridge) -> None:
        """Ends the machine when its bridge ends."""

        async def watch() -> None:
            status = await bridge.wait()
            for line in [*bridge.last_words(), f"{BRIDGE} ended with status {status}"]:
                self.complaints.feed(f"{line}\n".encode())
            with contextlib.suppress(ProcessLookupError):
                self._running.kill()

        self._tasks.append(asyncio.create_task(watch()))

    async def unless_ended(self, doing: Coroutine[Any, Any, T]) -> T:
        """What it gives; BootFailed with the last words where it fails or the process ends."""
        task = asyncio.create_task(doing)
        ended = asyncio.create_task(self._running.wait())
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and task.exception() is None:
                return task.result()
            # A call that fails is often the first sign of an end.
            await asyncio.wait({ended}, timeout=0 if not task.done() else 0.2)
            if ended.done():
                status = await self.wait()
                how = f"was killed by signal {-status}" if status < 0 else f"ended with {status}"
                raise BootFailed(
                    f"Firecracker {how} before the guest's agent answered",
                    console=self.last_words(),
                )
            return await task
        except CubecacheError as error:
            if isinstance(error, BootFailed) and error.console:
                raise
            raise BootFailed(
                error.message, console=self.last_words(), remedy=error.remedy
            ) from error
        finally:
            for one in (task, ended):
                one.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)

    async def _end(self) -> None:
        process = self._running
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "writer"):
            self.writer.close()
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()


class FirecrackerDriver:
    """Starts machines with one Firecracker program, in jails where there is a jailer.

    `cache` keeps unpacked kernels. Seconds: for Firecracker's answers, and for the guest's agent.
    """

    name = "firecracker"

    def __init__(
        self,
        program: Path,
        cache: Path,
        *,
        jailer: Jailer | None = None,
        metrics: bool = False,
        api_seconds: float = 10.0,
        agent_seconds: float = 60.0,
    ) -> None:
        self.program = program
        self._cache = cache
        self._jailer = jailer
        self._metrics = metrics
        self._api_seconds = api_seconds
        self._agent_seconds = agent_seconds

    async def describe(self) -> dict[str, str]:
        """Accelerator and Firecracker's version."""
        return {
            "driver": self.name,
            "machine": "firecracker, jailed" if self._jailer else "firecracker",
            "accelerator": "kvm",
            "version": await emulator_version(self.program),
        }

    async def start(self, spec: MachineSpec) -> FirecrackerMachine:
        """A running machine, its agent connected; raises BootFailed with nothing left."""
        check_firecracker_spec(spec)
        jail = self._jail(spec.directory)
        if jail is not None:
            jail.jailer.check()
            for disk in spec.disks:
                if isinstance(disk, VhostUserDisk):
                    raise Unsupported(
                        f"disk {disk.serial} is served outside of the machine's jail",
                        remedy="run without a jail",
                    )
            if spec.dies_with_owner:
                raise UsageError(
                    "a jailed machine changes its user, so it cannot be made to die with us",
                    remedy="run it as a pod, or without a jail",
                )
        kernel = await asyncio.to_thread(elf_kernel, spec.kernel, self._cache)
        closing = contextlib.AsyncExitStack()
        machine = FirecrackerMachine(jail.root if jail else spec.directory, closing)
        try:
            await self._start(machine, spec, kernel, jail, closing)
        except OSError as error:
            await machine.stop()
            raise BootFailed(f"Firecracker's files cannot be made: {error}") from error
        except BaseException:
            await machine.stop()
            raise
        return machine

    async def _start(
        self,
        machine: FirecrackerMachine,
        spec: MachineSpec,
        kernel: Path,
        jail: Jail | None,
        closing: contextlib.AsyncExitStack,
    ) -> None:
        home = jail.root if jail else spec.directory
        await asyncio.to_thread(clear_left_behind, spec.directory)
        files = BootFiles(str(kernel), str(spec.initrd))
        if jail is not None:
            closing.push_async_callback(asyncio.to_thread, clear_left_behind, spec.directory)
            closing.push_async_callback(asyncio.to_thread, jail.remove)
            await asyncio.to_thread(jail.make)
            await asyncio.to_thread(record_jail, spec.directory, jail)
            brought = [await asyncio.to_thread(jail.bring, one) for one in (kernel, spec.initrd)]
            files = BootFiles(*brought)
        closing.callback(remove, home / API_NAME, home / VSOCK_NAME)
        pipes = {LOG_NAME: machine.complaints.feed}
        if self._metrics:
            pipes[METRICS_NAME] = machine.feed_metrics
        for name, feed in pipes.items():
            pipe = await LinePipe.make(home / name, feed)
            closing.push_async_callback(pipe.close)
            if jail is not None:
                jail.give(home / name)
        bridged = bridged_disks(spec, jailed=jail is not None)
        bridge = None
        if bridged:
            bridge = await start_bridge(
                bridged,
                home,
                rates=spec.rates,
                record_in=spec.directory,
                dies_with_owner=spec.dies_with_owner,
            )
            closing.push_async_callback(bridge.stop)
            if jail is not None:
                for path in bridge.sockets:
                    jail.give(path)
        words = ["--api-sock", API_NAME]
        words = jail.command(words) if jail else [str(self.program), *words]
        await machine.run(words, dies_with_owner=spec.dies_with_owner)
        if bridge is not None:
            machine.guard(bridge)
        made = requests(spec, files, bridged, metrics=self._metrics)
        with reached(home) as place:
            machine.version = await machine.unless_ended(self._configure(place, made))
            machine.reader, machine.writer = await machine.unless_ended(
                connect_vsock(place / VSOCK_NAME, seconds=self._agent_seconds)
            )

    async def _configure(self, home: Path, made: list[Request]) -> str:
        async with FirecrackerApi(home / API_NAME, seconds=self._api_seconds) as api:
            version = await api.ready(seconds=self._api_seconds)
            for request in made:
                await api.put(request)
            await api.put(Request("/actions", dict(START), "the start"))
        return version

    async def adopt(self, process_id: int, started: int, directory: Path) -> AdoptedMachine:
        """A machine that an earlier process of ours started; raises MachineFailed."""
        return await adopt_firecracker(process_id, started, directory)

    def _jail(self, directory: Path) -> Jail | None:
        if self._jailer is None:
            return None
        return Jail(self._jailer, self.program, jail_name(directory.name))


async def _collect(stream: asyncio.StreamReader | None, tail: Tail) -> None:
    while stream is not None and (received := await stream.read(65536)):
        tail.feed(received)
