"""What a run of programs costs: wall time, CPU of all children, and the peak of their memory."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Cost:
    """Seconds, seconds of CPU (user and system), bytes: the sum of the tree's resident memory."""

    wall: float
    cpu: float
    memory: int


def _children(pid: int) -> list[int]:
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in listed.read_text().split()]
    return found


def _resident(pid: int) -> int:
    """Anonymous and shared-memory pages of a process and all below it, in bytes.

    Pages of files are left out: they are the page cache's, and programs share them.
    """
    try:
        total = 0
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) << 10
        return total + sum(map(_resident, _children(pid)))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def measured(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
) -> tuple[Cost, str]:
    """Runs programs one after another, each of which must succeed; the last one's stdout."""
    peak = 0
    done = threading.Event()
    running: list[int] = []

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_SECONDS):
            for pid in running[-1:]:
                peak = max(peak, _resident(pid))

    watcher = threading.Thread(target=watch)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    watcher.start()
    begin = time.monotonic()
    output = ""
    try:
        for command in commands:
            with subprocess.Popen(
                list(command),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environment or {})},
            ) as child:
                running.append(child.pid)
                output, errors = child.communicate()
            if child.returncode:
                raise SystemExit(f"{' '.join(command[:6])} failed:\n{errors[-2000:]}")
    finally:
        wall = time.monotonic() - begin
        done.set()
        watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, peak), output
