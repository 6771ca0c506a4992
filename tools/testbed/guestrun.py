"""One `cubecache run` with the time of everything that it shows."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from testbed.processes import dying_with_parent
from testbed.servers import store_environment

LONGEST_SECONDS = 300.0


@dataclass(frozen=True)
class GuestRun:
    """How a start went; `seconds` until its first output, or its end where it said nothing."""

    code: int
    output: str
    errors: str
    seconds: float
    events: tuple[tuple[str, float], ...]


def run_guest(command: Sequence[str]) -> GuestRun:
    """Runs the command, passes its output on, and times it from its start."""
    begin = time.monotonic()
    child = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | store_environment(),
        preexec_fn=dying_with_parent(),  # noqa: PLW1509 - our parents have one thread
    )
    try:
        said, first = _listen(child, begin)
        code = child.wait(30)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    end = time.monotonic() - begin
    output, errors = (said[name].decode(errors="replace") for name in ("out", "err"))
    for line in output.splitlines():
        print(f"  | {line}", flush=True)
    events = [("start to the program's first output", first)] if first is not None else []
    events.append(("start to the program's end", end))
    return GuestRun(code, output, errors, first if first is not None else end, tuple(events))


def _listen(child: subprocess.Popen[bytes], begin: float) -> tuple[dict[str, bytes], float | None]:
    said = {"out": b"", "err": b""}
    first: float | None = None
    with selectors.DefaultSelector() as selector:
        for name, stream in (("out", child.stdout), ("err", child.stderr)):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ, name)
        while selector.get_map():
            left = begin + LONGEST_SECONDS - time.monotonic()
            if left <= 0:
                os.killpg(child.pid, signal.SIGKILL)
                break
            for key, _ in selector.select(left):
                piece = os.read(key.fd, 65536)
                if not piece:
                    selector.unregister(key.fileobj)
                    continue
                said[key.data] += piece
                if key.data == "out" and first is None:
                    first = time.monotonic() - begin
    return said, first
