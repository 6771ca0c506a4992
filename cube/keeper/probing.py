"""Checks of a running container: a command in it, a connection, an HTTP answer.

The host speaks HTTP itself, over a connection that the agent makes inside the guest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cube.channel.messages import ExecSpec
from cube.link import GuestLink, GuestProcess, OutputStream
from cube.pod.model import Check, Probe
from imagecache.errors import CubecacheError

_HEAD_LIMIT: Final = 64 * 1024
_STATUS_FIELDS: Final = 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found."""

    passed: bool
    message: str = ""


async def run_check(link: GuestLink, container: int, check: Check, seconds: float) -> Verdict:
    """Makes a check once; everything that goes wrong is a failed check."""
    process: GuestProcess | None = None
    try:
        async with asyncio.timeout(seconds):
            if check.kind == "exec":
                process = link.execute(ExecSpec(container=container, arguments=check.command))
                return await _exec(process)
            process = link.connect(check.port, check.host or "127.0.0.1")
            if check.kind == "tcp":
                return await _tcp(process)
            return await _http(process, check)
    except TimeoutError:
        return Verdict(False, f"the {check.kind} check took longer than {seconds:g} s")
    except CubecacheError as error:
        return Verdict(False, error.message)
    finally:
        if process is not None:
            link.forget(process)


async def watch_probe(
    link: GuestLink, container: int, probe: Probe, on_change: Callable[[Verdict], None]
) -> None:
    """Makes a probe's checks for ever; tells each crossing of its thresholds, the first one too."""
    await asyncio.sleep(probe.initial_delay)
    good = bad = 0
    told: bool | None = None
    while True:
        verdict = await run_check(link, container, probe.check, probe.timeout)
        good, bad = (good + 1, 0) if verdict.passed else (0, bad + 1)
        enough = good >= probe.success_threshold or bad >= probe.failure_threshold
        if enough and told is not verdict.passed:
            told = verdict.passed
            on_change(verdict)
        await asyncio.sleep(probe.period)


async def _exec(process: GuestProcess) -> Verdict:
    draining = [
        asyncio.create_task(_drain(process.stdout)),
        asyncio.create_task(_drain(process.stderr)),
    ]
    try:
        ended = await process.exited
    finally:
        for task in draining:
            task.cancel()
        await asyncio.gather(*draining, return_exceptions=True)
    return Verdict(ended.code == 0, ended.problem or f"exit status {ended.code}")


async def _drain(stream: OutputStream) -> None:
    while await stream.read():
        pass


async def _tcp(process: GuestProcess) -> Verdict:
    await process.started.wait()  # set by its end as well
    if process.exited.done():
        ended = process.exited.result()
        return Verdict(ended.code == 0, ended.problem)
    return Verdict(True)


async def _http(process: GuestProcess, check: Check) -> Verdict:
    headers = {"Host": check.host or "127.0.0.1", "User-Agent": "cubecache-probe"}
    headers |= dict(check.headers)
    head = [f"GET {check.path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items())]
    await process.write_input("\r\n".join([*head, "Connection: close", "", ""]).encode())
    received = b""
    while b"\r\n" not in received and len(received) < _HEAD_LIMIT:
        piece = await process.stdout.read()
        if not piece:
            break
        received += piece
    fields = received.partition(b"\r\n")[0].split(b" ")
    if len(fields) < _STATUS_FIELDS or not fields[1].isdigit():
        problem = process.exited.result().problem if process.exited.done() else ""
        return Verdict(False, problem or "no HTTP answer")
    status = int(fields[1])
    return Verdict(200 <= status < 400, f"HTTP status {status}")
