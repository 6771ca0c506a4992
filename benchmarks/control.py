"""How fast the control API answers while the daemon builds on both cores and 50 exports are read.

Each round has a fresh store and daemon. One image is exported 50 times and read at random offsets
from a cold cache, each export so often a second; meanwhile the daemon builds other images, and one
caller asks the API one thing after the other. The medians of the rounds' quantiles are printed,
and beside them how late the daemon's event loop woke, by its own count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import nbd  # type: ignore[import-untyped]  # libnbd ships no types
from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES
from testbed.machine import ROOT, commit, machine
from testbed.processes import Stage

READ = "python-numpy"
BUILT = ("torch-cpu", "openjdk", "postgresql", "nodejs")
EXPORTS = 50
BLOCK = 64 << 10
GOAL_SECONDS = 0.1


@dataclass(frozen=True)
class Round:
    """Times of one round in seconds; `late` is the loop's p99 and worst, `builds` that ended."""

    times: dict[str, list[float]]
    late: tuple[float, float]
    builds: int
    reads: int

    def quantile(self, share: float, kind: str | None = None) -> float:
        """Over one kind of question, or over all of them."""
        chosen = [x for name, times in self.times.items() if kind in (None, name) for x in times]
        return sorted(chosen)[min(len(chosen) - 1, int(share * len(chosen)))]


class Api:
    """The daemon's API over its unix socket."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """One call; raises for anything but success."""
        async with self._session.request(method, f"http://x{path}", json=body) as answer:
            raw = await answer.read()
            if answer.status >= 400:
                raise SystemExit(f"{method} {path}: {answer.status} {raw[:300]!r}")
            return json.loads(raw) if answer.content_type == "application/json" else raw

    async def preload(self, images: Sequence[str]) -> list[str]:
        """Queues preloads; the jobs' ids."""
        answer = await self.call("POST", "/v1/preloads", {"images": list(images)})
        return [job["id"] for job in answer["preloads"]]

    async def ended(self, jobs: Sequence[str]) -> int:
        """How many of the jobs have ended."""
        answer = await self.call("GET", "/v1/preloads")
        mine = [job for job in answer["preloads"] if job["id"] in jobs]
        failed = [job["error"] for job in mine if job["state"] == "failed"]
        if failed:
            raise SystemExit(f"a build failed: {failed[0]}")
        return sum(job["state"] == "done" for job in mine)


def read_exports(uris: Sequence[str], a_second: float) -> None:
    """The guests, in a process of their own: random reads of each export until SIGTERM."""
    stop, counts = threading.Event(), list[int]()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def guest(uri: str) -> None:
        handle = nbd.NBD()
        handle.connect_uri(uri)
        size, dice = handle.get_size(), random.Random(uri)
        while not stop.wait(dice.uniform(0.5, 1.5) / a_second):
            handle.pread(BLOCK, dice.randrange(size // BLOCK) * BLOCK)
            counts.append(1)
        handle.shutdown()

    guests = [threading.Thread(target=guest, args=(uri,)) for uri in uris]
    for each in guests:
        each.start()
    for each in guests:
        each.join()
    print(len(counts), flush=True)


async def one_round(seconds: float, a_second: float) -> Round:
    """Everything afresh, once."""
    cache = ROOT / ".cache/images"
    images = [f"oci:{make(RECIPES[name], cache)}:{TAG}" for name in (READ, *BUILT)]
    with Stage() as stage:
        state = stage.folder / "state"
        command = [str(ROOT / ".venv/bin/cubecache"), "--state-dir", str(state), "serve"]
        daemon = stage.start(command, os.environ | {"CUBECACHE_CACHE_FILL": "none"})
        daemon.wait_until((state / "control.sock").exists, 60)
        connector = aiohttp.UnixConnector(path=str(state / "control.sock"))
        async with aiohttp.ClientSession(connector=connector) as session:
            api = Api(session)
            first = await api.preload(images[:1])
            version = -1
            while not await api.ended(first):
                path = f"/v1/preloads/{first[0]}?wait=5&since={version}"
                version = (await api.call("GET", path))["version"]
            bodies = [{"image": images[0], "name": f"guest-{n}"} for n in range(EXPORTS)]
            exports = [await api.call("POST", "/v1/exports", body) for body in bodies]
            readers = stage.start(
                [sys.executable, __file__, "--read", str(a_second), *(x["uri"] for x in exports)]
            )
            jobs = await api.preload(images[1:])
            asked = await ask(api, jobs, bodies[0], seconds)
            readers.stop(30)
            reads = int(readers.log.read_text().split()[-1])
            loop = (await api.call("GET", "/v1/cache"))["loop"]
        daemon.stop(30)
        late = (loop["late_p99_seconds"] or 0.0, loop["worst_seconds"])
        return replace(asked, late=late, reads=reads)


async def ask(api: Api, jobs: Sequence[str], body: dict[str, Any], seconds: float) -> Round:
    """Asks until the builds have ended, or so long."""
    questions = (
        ("GET", "/v1/status", None),
        ("GET", "/v1/exports", None),
        ("GET", f"/v1/exports/{body['name']}", None),
        ("GET", "/v1/preloads", None),
        ("GET", f"/v1/preloads/{jobs[0]}", None),
        ("GET", "/v1/cache", None),
        ("GET", "/metrics", None),
        ("POST", "/v1/exports", body),  # there already: found again, by a look into the store
    )
    times: dict[str, list[float]] = {f"{method} {path}": [] for method, path, _ in questions}
    until, done = time.monotonic() + seconds, 0
    while time.monotonic() < until and done < len(jobs):
        for method, path, given in questions:
            began = time.perf_counter()
            await api.call(method, path, given)
            times[f"{method} {path}"].append(time.perf_counter() - began)
            await asyncio.sleep(0.01)
        done = await api.ended(jobs)
    return Round(times, (0.0, 0.0), done, 0)


def main() -> int:
    """Prints the figures; 1 where the median p99 is above the goal."""
    parser = argparse.ArgumentParser(description="The control API under load.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30.0, help="at most, of one round")
    parser.add_argument("--reads", type=float, default=20.0, help="a second, of each export")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/control.json")
    parser.add_argument("--read", type=float, help="be the guests of the exports that follow")
    parser.add_argument("uris", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.read:
        read_exports(chosen.uris, chosen.read)
        return 0
    print(f"commit {commit()}; {machine()}; load {os.getloadavg()[0]:.1f}", flush=True)
    rounds = []
    for number in range(chosen.rounds):
        done = asyncio.run(one_round(chosen.seconds, chosen.reads))
        rounds.append(done)
        print(
            f"round {number + 1}: p50 {done.quantile(0.5) * 1000:.1f} ms, "
            f"p99 {done.quantile(0.99) * 1000:.1f} ms, "
            f"worst {done.quantile(1) * 1000:.1f} ms; loop p99 below {done.late[0] * 1000:.1f} ms, "
            f"worst {done.late[1] * 1000:.0f} ms; {done.builds} builds, {done.reads} reads; "
            f"load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    print("| question | p50 ms | p99 ms | worst ms |\n| --- | --- | --- | --- |")
    for kind in [*rounds[0].times, None]:
        cells = [
            # A round's jobs have names of their own.
            statistics.median(x.quantile(share, kind) for x in rounds if kind in (None, *x.times))
            * 1000
            for share in (0.5, 0.99, 1)
        ]
        name = "all" if kind is None else kind.replace(_job(kind), "ID")
        print(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    p99 = statistics.median(x.quantile(0.99) for x in rounds)
    about = {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    answer = {"about": about, "p99_seconds": p99, "rounds": [x.times for x in rounds]}
    chosen.output.write_text(json.dumps(answer) + "\n")
    print(f"p99 {p99 * 1000:.1f} ms, median of {len(rounds)}; goal below {GOAL_SECONDS * 1000:.0f}")
    return int(p99 >= GOAL_SECONDS)


def _job(kind: str) -> str:
    tail = kind.rpartition("/")[2]
    return tail if len(tail) == 32 else "\0"


if __name__ == "__main__":
    sys.exit(main())
