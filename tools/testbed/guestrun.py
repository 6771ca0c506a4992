"""One start of a program, in a microVM or by `chroot`, with the time of everything it shows."""

from __future__ import annotations

import json
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
    note: str = ""
    read_bytes: int = 0


def run_guest(command: Sequence[str]) -> GuestRun:
    """Runs `cubecache run --json ...`: stdout is the outcome, stderr the program's output.

    A run without events is one whose machine did not come up; `errors` then says why.
    """
    code, out, err, _, end = _run(command)
    try:
        outcome = json.loads(out)
        timeline: dict[str, float] = outcome["timeline"]
        before = float(outcome["export_seconds"])
    except (ValueError, KeyError, TypeError):
        return GuestRun(code, "", _why(out) or err or out, end, ())
    _show(err)
    named = [(f"microVM: {name}", at) for name, at in timeline.items()]
    first = before + timeline.get("first-output", timeline.get("exit", end))
    events = (
        ("export on a socket of its own", before),
        *named,
        ("command to first output", first),
        ("command to its end", end),
    )
    note = f"{outcome['machine']}, {outcome['accelerator']}"
    return GuestRun(code, err, err, first, events, note, int(outcome["read_bytes"]))


def run_program(command: Sequence[str]) -> GuestRun:
    """Runs a program of this host, passes its output on, and times it from its start."""
    code, out, err, first, end = _run(command)
    _show(out)
    events = [("program: first output", first)] if first is not None else []
    events.append(("program: end", end))
    return GuestRun(code, out, err, end if first is None else first, tuple(events))


def _why(out: str) -> str:
    """The message of an error object, or nothing where it is none."""
    try:
        error = json.loads(out)["error"]
        return f"{error['message']} ({error['remedy']})" if error["remedy"] else error["message"]
    except (ValueError, KeyError, TypeError):
        return ""


def _show(output: str) -> None:
    for line in output.splitlines():
        print(f"  | {line}", flush=True)


def _run(command: Sequence[str]) -> tuple[int, str, str, float | None, float]:
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
            _end(child)
    end = time.monotonic() - begin
    out, err = (said[name].decode(errors="replace") for name in ("out", "err"))
    return code, out, err, first, end


def _end(child: subprocess.Popen[bytes]) -> None:
    # Politely first: it has a machine and temporary folders to clear away.
    child.send_signal(signal.SIGINT)
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


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
                _end(child)
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
