"""One pod's life: images, disks, machine, containers, and their end; over and over as needed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Final, Protocol

from cube.configdisk import new_sync_key
from cube.errors import BootFailed, MachineFailed
from cube.keeper import status as words
from cube.keeper.backoff import BackOff
from cube.keeper.containerlife import ContainerLife
from cube.keeper.guestplan import (
    container_ids,
    directory_of,
)
from cube.keeper.placing import Equipment, Placing
from cube.keeper.record import MachineRow, PodRow
from cube.link import GuestLink
from cube.pod.model import Container, RestartPolicy
from cube.sandbox import BOOT_SECONDS, Sandbox
from cube.vm.adopted import process_start
from cube.vm.firecracker_adopted import clear_left_behind
from cube.vm.seam import (
    Machine,
)
from imagecache.errors import CubecacheError
from preload.client import Client

_LOG = logging.getLogger("cube.keeper")
_PING_SECONDS: Final = 20.0
_PING_PATIENCE: Final = 120.0  # an emulated guest on a busy host is slow
_ADOPT_SECONDS: Final = 60.0
_FINISH_SECONDS: Final = 5.0
_CONSOLE_LINES: Final = 15


class Host(Protocol):
    """What a pod's life needs of its keeper."""

    @property
    def state(self) -> Path: ...

    async def client(self) -> Client:
        """A client of the cache's daemon, which answers or is started; Unavailable."""

    async def equipment(self, driver: str | None) -> Equipment:
        """Driver, guest files; Unsupported where it cannot work on this host."""

    async def tools_disk(self) -> Path:
        """The tools disk, made if it is missing."""

    @property
    def boots(self) -> asyncio.Semaphore:
        """So many machines boot at a time: more would each be slower, and none ready sooner."""

    def changed(self, life: PodLife) -> None:
        """The pod's status, or its machine, is another one: to be recorded and told."""

    def take_claims(self, life: PodLife) -> None:
        """Holds the pod's disks for it alone; Busy naming the other pod."""


class PodLife:
    """A pod and the task that leads it. The keeper owns it; `run` is its task."""

    def __init__(self, host: Host, row: PodRow) -> None:
        self.pod = row.pod
        self.status = row.status
        self.machine = row.machine
        self.stopped = row.stopped
        self.sandbox: Sandbox | None = None
        self.over = asyncio.Event()  # the task has done everything
        self._host = host
        self._stop = asyncio.Event()
        self._grace: float = row.pod.grace_seconds
        self._lives: dict[str, ContainerLife] = {}
        self._tasks: list[asyncio.Task[bool]] = []
        self._asked = time.monotonic()
        self._placing = Placing(host, row.pod, row.status, self._changed)

    @property
    def directory(self) -> Path:
        """The pod's own directory."""
        return directory_of(self._host.state, self.status.uid)

    @property
    def row(self) -> PodRow:
        """What is recorded of it."""
        return PodRow(self.pod, self.status, self.machine, self.stopped)

    def container_id(self, name: str) -> int:
        """A container's id in the guest; KeyError."""
        return container_ids(self.pod)[name]

    def stop(self, grace_seconds: float | None = None) -> None:
        """Asks for the end; `over` is set when nothing of the machine is left."""
        if grace_seconds is not None:
            self._grace = grace_seconds
        self._stop.set()

    async def run(self) -> None:
        """Leads the pod to its end. Raises nothing but cancelling, which leaves the machine be."""
        try:
            await self._lead()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            _LOG.exception("pod %s: its supervision failed", self.pod.key)
            self.status.failed = True
            self.status.message = f"supervision failed: {error}"[: words.MESSAGE_LIMIT]
            await self._close()
            self._changed()
        self.over.set()

    async def _lead(self) -> None:
        working = asyncio.create_task(self._work())
        stopping = asyncio.create_task(self._stop.wait())
        deadline = self.pod.deadline_seconds or None
        try:
            await asyncio.wait(
                {working, stopping}, timeout=deadline, return_when=asyncio.FIRST_COMPLETED
            )
            if not working.done():
                if not stopping.done():
                    self.status.failed = True
                    self.status.message = f"activeDeadlineSeconds of {deadline} passed"
                else:
                    self.status.terminating = True
                self._changed()
                await self._wind_down()
                working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            if working.done() and not working.cancelled() and working.exception() is not None:
                await working
            await self._close()
            self._changed()
        except asyncio.CancelledError:
            # The keeper ends: machine and exports stay for the next one.
            self._let_go()
            raise
        finally:
            for task in (working, stopping, *self._tasks):
                task.cancel()
            await asyncio.gather(working, stopping, *self._tasks, return_exceptions=True)

    async def _work(self) -> None:
        machines, refusals = BackOff(), BackOff(1)
        while True:
            begun = time.monotonic()
            try:
                sandbox = await self._machine()
                await self._attend(sandbox)
                await sandbox.power_off()
                return
            except MachineFailed as error:
                told = error.console[-3:] if isinstance(error, BootFailed) else ()
                message = "; ".join([error.message, *told])
                _LOG.warning("pod %s: %s", self.pod.key, message)
                await self._close()
                for life in self._lives.values():
                    life.lost(message)
                self.status.message = message[: words.MESSAGE_LIMIT]
                ran = any(status.started for status in self.status.containers)
                if ran and self.pod.restart is RestartPolicy.NEVER:
                    self.status.failed = True
                    return
                delay = machines.next_delay(time.monotonic() - begun)
                self._await_machine(words.CRASH_LOOP if delay else words.CREATING, message)
            except CubecacheError as error:
                _LOG.warning("pod %s: %s", self.pod.key, error)
                await self._close()
                delay = refusals.next_delay(0)
                self._await_machine(words.CREATE_ERROR, str(error))
            await asyncio.sleep(delay)
            self._asked = time.monotonic()

    def _await_machine(self, reason: str, message: str) -> None:
        for status in self.status.containers:
            if status.started and not status.init:
                status.restarts += 1
            status.state = "waiting"
            status.ready = False
            if status.reason not in (words.PULL_ERROR, words.PULL_BACK_OFF):
                status.reason = reason
                status.message = message[: words.MESSAGE_LIMIT]
        self._changed()

    # --- machine

    async def _machine(self) -> Sandbox:
        """The machine that runs already, or a new one."""
        if self.machine is not None:
            try:
                return await self._adopt(self.machine)
            except MachineFailed as error:
                await self._close()
                raise MachineFailed(f"not taken over: {error.message}") from error
        return await self._boot()

    async def _adopt(self, row: MachineRow) -> Sandbox:
        equipment = await self._host.equipment(self.pod.driver)
        self._host.take_claims(self)
        machine = await equipment.driver.adopt(row.process, row.started, self.directory)
        link = GuestLink(machine.reader, machine.writer, sync_key=bytes.fromhex(row.sync_key))
        self.sandbox = Sandbox(machine, link, time.monotonic())
        await self.sandbox.booted(seconds=_ADOPT_SECONDS)
        self.status.message = ""
        return self.sandbox

    async def _boot(self) -> Sandbox:
        self._asked = time.monotonic()
        for status in self.status.containers:
            status.state, status.reason, status.message = "waiting", words.PENDING, ""
        self._changed()
        equipment, images = await asyncio.gather(
            self._host.equipment(self.pod.driver), self._placing.images()
        )
        self._mark("images")
        self._host.take_claims(self)
        sync_key = new_sync_key()
        spec = await self._placing.place(equipment, images, sync_key)
        for status in self.status.containers:
            status.reason = words.CREATING
        async with self._host.boots:
            started = time.monotonic()
            machine = await equipment.driver.start(spec)
            await self._record(machine, sync_key)
            self._mark("machine")
            self.sandbox = Sandbox(machine, GuestLink(machine.reader, machine.writer), started)
            await self.sandbox.booted(seconds=BOOT_SECONDS)
        self.status.message = ""
        self._mark("agent")
        return self.sandbox

    async def _record(self, machine: Machine, sync_key: bytes) -> None:
        exports = tuple(handle.name for handle in self._placing.handles.values())
        pid = machine.process_id
        self.machine = MachineRow(pid, process_start(pid), sync_key.hex(), exports)
        self._changed()

    # --- containers

    async def _attend(self, sandbox: Sandbox) -> None:
        """Runs the containers until all are over; raises MachineFailed."""
        watching = asyncio.create_task(self._watch(sandbox))
        attending = asyncio.create_task(self._containers(sandbox))
        try:
            await asyncio.wait({watching, attending}, return_when=asyncio.FIRST_COMPLETED)
            if attending.done():
                await attending
            else:
                await watching
        finally:
            for task in (watching, attending, *self._tasks):
                task.cancel()
            await asyncio.gather(watching, attending, *self._tasks, return_exceptions=True)

    async def _watch(self, sandbox: Sandbox) -> None:
        """Raises MachineFailed when the machine no longer answers."""
        while True:
            await asyncio.sleep(_PING_SECONDS)
            try:
                await sandbox.link.ping(seconds=_PING_PATIENCE)
            except CubecacheError as error:
                raise MachineFailed(
                    f"the machine hangs: {error.message}",
                    console=sandbox.machine.last_words()[-_CONSOLE_LINES:],
                ) from error

    async def _containers(self, sandbox: Sandbox) -> None:
        for container in self.pod.init_containers:
            status = self.status.container(container.name)
            if status is not None and _done(status) and sandbox.link.states:
                continue  # adopted: it was over before
            life = self._life(container)
            if not await life.live(sandbox):
                self.status.failed = not self._stop.is_set()
                self.status.message = f"init container {container.name} failed"
                return
        self._tasks = []
        for container in self.pod.containers:
            self._tasks.append(asyncio.create_task(self._life(container).live(sandbox)))
        self._mark("containers")
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            await task
        self._changed()

    def _life(self, container: Container) -> ContainerLife:
        status = self.status.container(container.name)
        if status is None:
            raise KeyError(container.name)
        handle = self._placing.handles.get(container.name)
        life = ContainerLife(
            container,
            self.container_id(container.name),
            status,
            policy=self.pod.restart,
            logs=self.directory / "logs" / container.name,
            stop_signal=_signal_number(handle.config.stop_signal if handle else ""),
            grace_seconds=self.pod.grace_seconds,
            on_change=self._changed,
        )
        self._lives[container.name] = life
        return life

    async def _wind_down(self) -> None:
        """Ends the containers, each within the grace, and lets the guest power off."""
        sandbox = self.sandbox
        if sandbox is None or not sandbox.link.greeted.done():
            return
        stops = [life.stop(sandbox, self._grace) for life in self._lives.values()]
        await asyncio.gather(*stops, return_exceptions=True)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_FINISH_SECONDS)
        await sandbox.power_off()

    # --- ends

    async def _close(self) -> None:
        """Ends machine and exports; idempotent."""
        sandbox, self.sandbox = self.sandbox, None
        row, self.machine = self.machine, None
        if sandbox is not None:
            await asyncio.shield(sandbox.close())
        elif row is not None:
            if process_start(row.process) == row.started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(row.process, signal.SIGKILL)
            await asyncio.to_thread(clear_left_behind, self.directory)
        names = {handle.name for handle in self._placing.handles.values()}
        names |= set(row.exports if row is not None else ())
        self._placing.handles.clear()
        if names:
            with contextlib.suppress(CubecacheError):
                client = await self._host.client()
                for name in names:
                    with contextlib.suppress(CubecacheError):
                        await client.unexport(name, force=True)
        self._changed()

    def _let_go(self) -> None:
        """Leaves the machine running, for a later keeper."""
        if self.sandbox is not None:
            self.sandbox.machine.writer.transport.abort()

    async def remove_files(self) -> None:
        """Removes the pod's directory, when it is over."""
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)

    def _mark(self, name: str) -> None:
        self.status.timeline[name] = round(time.monotonic() - self._asked, 4)
        self._changed()

    def _changed(self) -> None:
        self.status.settle()
        self._host.changed(self)


def _done(status: words.ContainerStatus) -> bool:
    return status.state == "terminated" and status.code == 0


def _signal_number(name: str) -> int:
    """An image's stop signal, by name or number; SIGTERM where it has none that is known."""
    if name.isdigit() and 0 < int(name) < 65:
        return int(name)
    full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
    known = signal.Signals.__members__.get(full)
    return int(known) if known is not None else int(signal.SIGTERM)
