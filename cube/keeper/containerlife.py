"""One container's life inside a running machine: start, log, probe, end, start again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cube.keeper import status as words
from cube.keeper.backoff import BackOff, wants_restart
from cube.keeper.logfile import LogWriter
from cube.keeper.probing import Verdict, run_check, watch_probe
from cube.keeper.status import ContainerStatus, LastEnd
from cube.link import GuestProcess, OutputStream, ProcessExit
from cube.pod.model import Container, Probe, RestartPolicy
from cube.sandbox import Sandbox
from imagecache.errors import CubecacheError

_DRAIN_SECONDS: Final = 5.0
_HOOK_SECONDS: Final = 30.0
_KILLED: Final = 137
_COULD_NOT_START: Final = (125, 126, 127)


class ContainerLife:
    """Owned by its pod's life, which runs `live` as a task and ends it by `stop` or cancelling."""

    def __init__(
        self,
        container: Container,
        identity: int,
        status: ContainerStatus,
        *,
        policy: RestartPolicy,
        logs: Path,
        stop_signal: int,
        grace_seconds: int,
        on_change: Callable[[], None],
    ) -> None:
        self.container = container
        self.id = identity
        self.status = status
        self.process: GuestProcess | None = None
        self._policy = policy
        self._logs = logs
        self._stop_signal = stop_signal
        self._grace = grace_seconds
        self._on_change = on_change
        self._back_off = BackOff(status.restarts)
        self._ending = asyncio.Event()
        self._unhealthy = ""
        self._killing: asyncio.Task[None] | None = None

    async def live(self, sandbox: Sandbox) -> bool:
        """Runs it until it needs no further start; whether it ended well.

        Raises MachineFailed when the machine ended first.
        """
        known = sandbox.link.states.get(self.id)
        while True:
            if known is None:
                self._waiting(words.CREATING)
            begun = time.monotonic()
            if known is not None and self.status.started:
                # Adopted: it ran before this keeper did.
                begun -= max(time.time() - self.status.started, 0)
            ended = await self._run(sandbox, known)
            known = None
            ran = time.monotonic() - begun
            again = wants_restart(self._policy, ended.code, init=self.status.init)
            if self._ending.is_set() or not again:
                return ended.code == 0
            delay = self._back_off.next_delay(ran)
            self.status.last = LastEnd(
                code=ended.code,
                signal=ended.signal,
                reason=self.status.reason,
                finished=self.status.finished,
            )
            if delay:
                failed = ended.problem and ended.code in _COULD_NOT_START
                self._waiting(words.CREATE_ERROR if failed else words.CRASH_LOOP)
                self.status.message = ended.problem or f"starts again in {delay:.0f} s"
                self._on_change()
            if await self._pause(delay):
                return ended.code == 0
            self.status.restarts += 1

    async def stop(self, sandbox: Sandbox, grace_seconds: float) -> None:
        """Ends it for good: its hook, its signal, and after the grace everything in it is killed.

        Returns when its process is over or was killed; `live` then returns.
        """
        self._ending.set()
        process = self.process
        if process is not None and not process.exited.done():
            await self._end(sandbox, process, grace_seconds)

    def lost(self, message: str) -> None:
        """Its machine is gone."""
        if self.status.state == "running" or self.status.reason == words.CREATING:
            self.status.state = "terminated"
            self.status.reason = words.ERROR
            self.status.message = message[: words.MESSAGE_LIMIT]
            self.status.code = _KILLED
            self.status.signal = signal.SIGKILL
            self.status.finished = time.time()
        self.status.ready = False

    async def _run(self, sandbox: Sandbox, known: GuestProcess | None) -> ProcessExit:
        self._unhealthy = ""
        process = known or sandbox.link.start(self.id)
        self.process = process
        log = await asyncio.to_thread(LogWriter, self._logs, resumed=known is not None)
        pumps = [
            asyncio.create_task(_pump(process.stdout, log, "stdout")),
            asyncio.create_task(_pump(process.stderr, log, "stderr")),
        ]
        exited = asyncio.create_task(sandbox.exit_of(process))
        started = asyncio.create_task(process.started.wait())
        caring: asyncio.Task[None] | None = None
        try:
            await asyncio.wait({exited, started}, return_when=asyncio.FIRST_COMPLETED)
            if not process.exited.done() and not exited.done():
                self._running(resumed=known is not None)
                caring = asyncio.create_task(self._care(sandbox, process))
            ended = await exited
            await asyncio.wait(pumps, timeout=_DRAIN_SECONDS)
            self._over(ended)
            return ended
        finally:
            tasks = [exited, started, *pumps, *([caring] if caring else [])]
            if self._killing is not None:
                tasks.append(self._killing)
                self._killing = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(log.close, time.time())

    async def _care(self, sandbox: Sandbox, process: GuestProcess) -> None:
        """Its start hook, then its probes, until it ends."""
        container, link = self.container, sandbox.link
        if container.post_start is not None:
            verdict = await run_check(link, self.id, container.post_start, _HOOK_SECONDS)
            if not verdict.passed:
                self._kill(sandbox, process, f"postStart failed: {verdict.message}")
                return
        if container.startup is not None:
            await self._started_up(sandbox, process, container.startup)
        if container.readiness is None:
            self._set_ready(Verdict(True))
        watching = []
        if container.readiness is not None:
            watching.append(watch_probe(link, self.id, container.readiness, self._set_ready))
        if container.liveness is not None:

            def on_liveness(verdict: Verdict) -> None:
                if not verdict.passed:
                    self._kill(sandbox, process, f"liveness probe failed: {verdict.message}")

            watching.append(watch_probe(link, self.id, container.liveness, on_liveness))
        await asyncio.gather(*watching)

    async def _started_up(self, sandbox: Sandbox, process: GuestProcess, probe: Probe) -> None:
        passed = asyncio.Event()

        def on_startup(verdict: Verdict) -> None:
            if verdict.passed:
                passed.set()
            else:
                self._kill(sandbox, process, f"startup probe failed: {verdict.message}")

        watching = asyncio.create_task(watch_probe(sandbox.link, self.id, probe, on_startup))
        try:
            await passed.wait()
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    def _set_ready(self, verdict: Verdict) -> None:
        self.status.ready = verdict.passed
        self.status.message = "" if verdict.passed else f"not ready: {verdict.message}"
        self._on_change()

    def _kill(self, sandbox: Sandbox, process: GuestProcess, why: str) -> None:
        if self._killing is None:
            self._unhealthy = why
            self._killing = asyncio.create_task(self._end(sandbox, process, self._grace))

    async def _end(self, sandbox: Sandbox, process: GuestProcess, grace: float) -> None:
        deadline = time.monotonic() + grace
        if self.container.pre_stop is not None and grace > 0:
            await run_check(sandbox.link, self.id, self.container.pre_stop, grace)
        process.signal(self._stop_signal)
        if await _ends(process, deadline - time.monotonic()):
            return
        process.signal(signal.SIGKILL, everything=True)
        await _ends(process, _DRAIN_SECONDS)

    async def _pause(self, seconds: float) -> bool:
        """Waits; whether the end was asked for meanwhile."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), seconds)
        return self._ending.is_set()

    def _waiting(self, reason: str) -> None:
        self.status.state = "waiting"
        self.status.reason = reason
        self.status.ready = False
        self._on_change()

    def _running(self, *, resumed: bool) -> None:
        self.status.state = "running"
        self.status.reason = words.RUNNING
        self.status.message = ""
        if not resumed or not self.status.started:
            self.status.started = time.time()
        if not self._cares:
            self.status.ready = True
        self._on_change()

    @property
    def _cares(self) -> bool:
        one = self.container
        return any((one.post_start, one.startup, one.readiness))

    def _over(self, ended: ProcessExit) -> None:
        status = self.status
        status.state = "terminated"
        status.ready = False
        status.code, status.signal = ended.code, ended.signal
        status.finished = time.time()
        status.reason = words.COMPLETED if ended.code == 0 else words.ERROR
        if ended.out_of_memory:
            status.reason = words.OUT_OF_MEMORY
        status.message = (ended.problem or self._unhealthy)[: words.MESSAGE_LIMIT]
        self._on_change()


async def _ends(process: GuestProcess, seconds: float) -> bool:
    if seconds > 0:
        with contextlib.suppress(CubecacheError):
            await process.wait(seconds=seconds)
    return process.exited.done()


async def _pump(stream: OutputStream, log: LogWriter, name: str) -> None:
    lost = 0
    while content := await stream.read():
        if stream.lost > lost:
            await asyncio.to_thread(log.lost, name, stream.lost - lost, time.time())
            lost = stream.lost
        await asyncio.to_thread(log.write, name, content, time.time())
