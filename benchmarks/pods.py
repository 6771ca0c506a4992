"""Pods: time from `run` to the container's first instruction, by part, and twenty pods at once.

Image and store are behind a counting proxy. A pod's program prints one word; its time is when the
agent said that it was executed. Kinds of start: `unknown` (nobody has preloaded the image: it is
built on the way), `known` (stored, this host has nothing of it), `profiled` (stored, with a profile
recorded from a start, host without it), `warm` (again on the same host). Parts: images (the
daemon's answer to the exports), machine (disks, configuration, QEMU started), agent (the guest has
booted), first instruction.

The orchestrator's own share is measured with the guest left out: processor time of the keeper and
of this client for each pod, and wall time from the request until QEMU runs, less the daemon's.
Guests under emulation take seconds to boot; under KVM it is not measured here, and stated as such.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES
from testbed.machine import ROOT, commit, machine
from testbed.processes import Stage
from testbed.servers import BUCKET, Proxy, start_object_store, start_proxy, store_environment

from cube.keeper.status import PodStatus
from cube.orchestrator import Cube
from cube.pod.model import Container, Pod, RestartPolicy
from imagecache.settings import Settings, load_settings

TICKS = os.sysconf("SC_CLK_TCK")
LONGEST = 600.0
COMMAND = ("/bin/busybox", "sh", "-c", "echo first; while :; do sleep 1; done")


def pod(name: str, image: str) -> Pod:
    container = Container(name="main", image=image, command=COMMAND, memory_bytes=64 << 20)
    return Pod(name=name, containers=(container,), restart=RestartPolicy.NEVER, grace_seconds=0)


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


class Host:
    """One state directory: its keeper and daemon are ended with it."""

    def __init__(self, stage: Stage, name: str, store: str) -> None:
        self.directory = stage.folder / name
        self.settings: Settings = load_settings(os.environ, state_dir=self.directory, store=store)

    def pid(self, mark: bytes) -> int:
        state = os.fsencode(self.directory)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if state in words and mark in words:
                    return int(entry.name)
        return 0

    def end(self) -> None:
        for mark in (b"cube.keeper", b"\0serve"):
            pid = self.pid(mark)
            if pid:
                os.kill(pid, 15)
                deadline = time.monotonic() + 60
                while self.pid(mark) == pid and time.monotonic() < deadline:
                    time.sleep(0.1)


async def running(cube: Cube, status: PodStatus) -> PodStatus:
    found = await cube.wait(status.key, seconds=LONGEST)
    if found.state != "Running":
        raise SystemExit(f"{found.key} is {found.state}: {found.model_dump_json(indent=1)}")
    return found


async def one(host: Host, image: str, name: str) -> dict[str, float]:
    async with Cube(settings=host.settings) as cube:
        await cube.ensure_keeper()
        begun = time.monotonic()
        status = await running(cube, await cube.apply(pod(name, image)))
        seconds = time.monotonic() - begun
        await cube.delete(name, grace_seconds=0)
        return {**status.timeline, "running": round(seconds, 3)}


async def record(host: Host, image: str) -> None:
    """Starts the program once by `cubecache run --record`: the store has a profile then."""
    command = [str(ROOT / ".venv/bin/cubecache"), "--state-dir", str(host.directory)]
    command += ["--store", host.settings.store_url, "run", "--record", image, "--"]
    process = await asyncio.create_subprocess_exec(*command, *COMMAND[:3], "echo first")
    async with asyncio.timeout(LONGEST):
        if await process.wait():
            raise SystemExit("the recorded run failed")


async def many(host: Host, proxy: Proxy, image: str, count: int) -> dict[str, Any]:
    async with Cube(settings=host.settings) as cube:
        await cube.ensure_keeper()
        keeper = host.pid(b"cube.keeper")
        before, own = processor_seconds(keeper), time.process_time()
        proxy.reset()
        begun = time.monotonic()
        names = [f"many-{number}" for number in range(count)]
        asked = await asyncio.gather(*(cube.apply(pod(name, image)) for name in names))
        statuses = await asyncio.gather(*(running(cube, status) for status in asked))
        seconds = time.monotonic() - begun
        busy = processor_seconds(keeper) - before + time.process_time() - own
        fetched = proxy.fetched_bytes()
        begun = time.monotonic()
        await asyncio.gather(*(cube.delete(name, grace_seconds=0) for name in names))
        walls = [one.timeline["machine"] - one.timeline["images"] for one in statuses]
        return {
            "pods": count,
            "all_running_s": round(seconds, 2),
            "deleted_s": round(time.monotonic() - begun, 2),
            "origin_bytes": fetched,
            "keeper_and_client_cpu_ms_per_pod": round(busy / count * 1000, 1),
            "own_wall_ms_median": round(statistics.median(walls) * 1000, 1),
            "own_wall_ms_worst": round(max(walls) * 1000, 1),
        }


async def measure(stage: Stage, recipe: str, rounds: int, count: int) -> dict[str, Any]:
    image = f"oci:{make(RECIPES[recipe], ROOT / '.cache' / 'images')}:{TAG}"
    os.environ.update(store_environment())
    results: dict[str, list[dict[str, float]]] = {}
    together: dict[str, Any] = {}
    for number in range(rounds):
        objects = start_object_store(stage)
        proxy = start_proxy(stage, objects.endpoint)
        store = f"s3://{BUCKET}/pods?endpoint={proxy.endpoint}"
        hosts = [Host(stage, f"{kind}{number}", store) for kind in ("u", "k", "p", "m")]
        unknown, known, profiled, crowd = hosts
        try:
            results.setdefault("unknown", []).append(await one(unknown, image, "unknown"))
            results.setdefault("known", []).append(await one(known, image, "known"))
            results.setdefault("warm", []).append(await one(known, image, "warm"))
            await record(known, image)
            results.setdefault("profiled", []).append(await one(profiled, image, "profiled"))
            if count and number == 0:
                together = await many(crowd, proxy, image, count)
        finally:
            for host in hosts:
                await asyncio.to_thread(host.end)
    medians = {
        kind: {part: round(statistics.median(row[part] for row in rows), 3) for part in rows[0]}
        for kind, rows in results.items()
    }
    return {"image": recipe, "rounds": rounds, "starts_s": medians, "together": together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", default="static-busybox", choices=sorted(RECIPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", type=int, default=20, help="pods at once; 0 for none")
    options = parser.parse_args()
    with Stage() as stage:
        found = asyncio.run(measure(stage, options.image, options.rounds, options.together))
    found |= {"machine": machine(), "commit": commit(), "load": os.getloadavg()[0]}
    found["kvm"] = "time to the guest's first instruction under KVM: not measured"
    folder = ROOT / ".cache" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pods.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
