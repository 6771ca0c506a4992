"""What the two integrity policies of the host cache cost: reads per second, processor time a read.

One image, all of it in the arena, served by two daemons in turn, round by round: `admission` (from
the map) and `every-read` (read by preadv, checked by sums per block, the copy is sent). fio's nbd
engine reads it. The processor time is the daemon's own. `--first-use` also times the first read of
the whole disk after a restart, when `admission` compares each chunk with its digest.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES
from nbd_read import COMMAND, WORKLOADS, Server, Span, measure, run
from sequential import cpu_seconds
from testbed.machine import ROOT, commit, machine
from testbed.processes import Process, Stage

POLICIES = ("admission", "every-read")


class Host:
    """One state directory, served by one policy at a time."""

    def __init__(self, stage: Stage, policy: str, image: str) -> None:
        self.stage = stage
        self.config = stage.folder / f"{policy}.toml"
        self.config.write_text(f'[cache]\nintegrity = "{policy}"\n')
        self.base = [COMMAND, "--config", str(self.config)]
        self.base += ["--state-dir", str(stage.folder / policy)]
        self.base += ["--store", (stage.folder / "store").as_uri()]
        self.image = image
        self.process: Process | None = None
        self.server = Server(policy, "")

    def start(self) -> None:
        """Serves the image."""
        process = self.stage.start([*self.base, "serve", "--fill", "whole"])
        process.wait_until(lambda: b"ready:" in process.log.read_bytes(), 60)
        self.process = process
        self.server = Server(self.server.name, run([*self.base, "export", self.image]).strip())

    def restart(self) -> None:
        """The same again, by a new daemon that trusts nothing."""
        assert self.process is not None
        self.process.stop()
        self.start()

    @property
    def pid(self) -> int:
        """The daemon's."""
        assert self.process is not None
        return self.process.child.pid


def main() -> None:
    """Measures both and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", default="python-numpy", choices=sorted(RECIPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--first-use", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/integrity.json")
    chosen = parser.parse_args()
    image = f"oci:{make(RECIPES[chosen.image], ROOT / '.cache/images')}:{TAG}"
    rows: list[dict[str, Any]] = []
    first_use: dict[str, float] = {}
    with Stage() as stage:
        hosts = [Host(stage, policy, image) for policy in POLICIES]
        run([*hosts[0].base, "preload", image])
        shutil.copytree(stage.folder / POLICIES[0], stage.folder / POLICIES[1])
        layers = json.loads(run([*hosts[0].base, "inspect", image, "--json"]))["layers"]
        start = min(layer["offset_bytes"] for layer in layers if layer["size_bytes"])
        end = max(layer["offset_bytes"] + layer["size_bytes"] for layer in layers)
        span = Span(start, (end - start) >> 20 << 20)
        for host in hosts:
            host.start()
            run(["nbdcopy", host.server.uri, "null:"])
            if chosen.first_use:
                time.sleep(2)
                host.restart()
                begin = time.monotonic()
                run(["nbdcopy", host.server.uri, "null:"])
                first_use[host.server.name] = time.monotonic() - begin
        for load in WORKLOADS:
            found: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
            for _ in range(chosen.rounds):
                for host in hosts:
                    before = cpu_seconds(host.pid)
                    got = measure(host.server.uri, span, load, 1, chosen.seconds)
                    # fio warms for a second besides: its reads cost the same.
                    reads = got.reads_per_second * (chosen.seconds + 1)
                    used = cpu_seconds(host.pid) - before
                    found[host.server.name].append((got.reads_per_second, used / reads * 1e6))
            row = {
                policy: {
                    "reads_per_second": statistics.median(x[0] for x in runs),
                    "cpu_us_per_read": statistics.median(x[1] for x in runs),
                }
                for policy, runs in found.items()
            }
            rows.append({"workload": load.name, **row})
    about = {"machine": machine(), "commit": commit(), "load": os.getloadavg()[0]}
    result = {**about, "rows": rows, "first_use_seconds": first_use}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"commit {about['commit']}; {about['machine']}; load {about['load']:.1f}")
    print("| workload | admission | every-read | of it | CPU us a read: admission | every-read |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        fast, safe = row["admission"], row["every-read"]
        share = safe["reads_per_second"] / fast["reads_per_second"]
        print(
            f"| {row['workload']} | {fast['reads_per_second']:,.0f}/s "
            f"| {safe['reads_per_second']:,.0f}/s | {share:.2f} "
            f"| {fast['cpu_us_per_read']:.1f} | {safe['cpu_us_per_read']:.1f} |"
        )
    for policy, seconds in first_use.items():
        print(f"whole disk, first read after a restart, {policy}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
