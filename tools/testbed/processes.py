"""Child processes that die with their parent, write a log, and are stopped in reverse order."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

_PR_SET_PDEATHSIG = 1
# Looked up here: between fork and exec a look-up could wait for a lock whose thread is not there.
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl


class StageError(Exception):
    """A server did not start; the message ends with its log."""


def dying_with_parent() -> Callable[[], None]:
    """What a child runs before exec so that the kernel ends it when this process ends."""
    parent = os.getpid()

    def prepare() -> None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def completed(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Runs `command` to its end with its output captured; raises `subprocess.TimeoutExpired`.

    `subprocess.run` kills the child alone and then waits, without end, for whoever else holds its
    pipes: a machine or a daemon that the child started.
    """
    child = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(environment) if environment is not None else None,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=seconds)
    except BaseException as ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            said, complained = child.communicate(timeout=5)
            if isinstance(ended, subprocess.TimeoutExpired):
                ended.output, ended.stderr = said, complained
        raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


class Process:
    """One child in a process group of its own; `log` holds its stdout and stderr."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = Path(command[0]).name
        self.log = log
        with log.open("wb") as output:
            self.child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment) if environment is not None else None,
                start_new_session=True,
                preexec_fn=dying_with_parent(),  # noqa: PLW1509 - our parents have one thread
            )

    def wait_until(self, ready: Callable[[], bool], seconds: float = 30.0) -> None:
        """Returns when `ready()`; raises `StageError` when the process ends or time is up."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.child.poll() is not None or time.monotonic() > deadline:
                tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise StageError(f"{self.name} did not start:\n{tail}")
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends the process and all of its group at once."""
        self._signal(signal.SIGKILL)
        self.child.wait()

    def stop(self, seconds: float = 10.0) -> int:
        """Asks the process to end, then ends it; returns its exit code (negative: a signal)."""
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(seconds)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGKILL)
        self._signal(signal.SIGKILL)
        return self.child.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.child.pid, number)
        except ProcessLookupError:
            return


class Stage:
    """The processes and the scratch folder of one run, all gone when it is left."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="cubecache-"))
        self._owns_folder = folder is None
        self._processes: list[Process] = []

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> Process:
        """Starts `command`; its log is a file of the scratch folder."""
        log = self.folder / f"{len(self._processes):02d}-{Path(command[0]).name}.log"
        process = Process(command, log, environment)
        self._processes.append(process)
        return process

    def close(self) -> None:
        """Stops every process, last started first, and removes the scratch folder."""
        while self._processes:
            self._processes.pop().stop()
        if self._owns_folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    """A TCP port of loopback that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    """Whether something listens on the loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
