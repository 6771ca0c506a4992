"""Reads over NBD: an export of `cubecache serve` beside nbdkit's file plugin and qemu-nbd.

All three serve the same bytes (the virtual disk of a real multi-layer image) over a unix socket,
from memory: ours from its filled arena with recording and metrics on, the others from a page-cached
file. fio's nbd engine reads them in turn, round by round; the medians of the rounds are compared.
Holes before the first layer are left out: who knows them answers them without reading. The limit is
what the smallest possible loop pushes through such a socket (pushlimit.c), the share ours of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES
from pushlimit import PushLimit
from testbed.machine import ROOT, commit, machine, version
from testbed.processes import Process, Stage

COMMAND = str(ROOT / ".venv/bin/cubecache")


@dataclass(frozen=True)
class Workload:
    """One pattern of reads: block size, depth per connection, random or sequential."""

    name: str
    block: str
    depth: int
    pattern: str


WORKLOADS = (
    Workload("4 KiB random, depth 1", "4k", 1, "randread"),
    Workload("4 KiB random, depth 32", "4k", 32, "randread"),
    Workload("64 KiB random, depth 16", "64k", 16, "randread"),
    Workload("1 MiB sequential, depth 8", "1m", 8, "read"),
)


@dataclass(frozen=True)
class Server:
    """Who serves: its name in tables and the URI of its disk."""

    name: str
    uri: str


@dataclass(frozen=True)
class Span:
    """The part of the disk that is read, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class Measurement:
    """What one run of fio read, and how long half and nearly all of its requests took."""

    reads_per_second: float
    bytes_per_second: float
    median_us: float
    p99_us: float


def run(command: list[str]) -> str:
    """Runs a program that must succeed; returns its stdout."""
    outcome = subprocess.run(command, check=False, capture_output=True, text=True)
    if outcome.returncode:
        raise SystemExit(f"nbd_read: {' '.join(command[:4])} failed:\n{outcome.stderr[-2000:]}")
    return outcome.stdout


def measure(uri: str, span: Span, load: Workload, connections: int, seconds: int) -> Measurement:
    """One run of fio."""
    out = run(
        [
            "fio",
            "--name=read",
            "--ioengine=nbd",
            f"--uri={uri}",
            f"--rw={load.pattern}",
            f"--bs={load.block}",
            f"--iodepth={load.depth}",
            f"--numjobs={connections}",
            f"--offset={span.offset}",
            f"--size={span.length}",
            f"--runtime={seconds}",
            "--ramp_time=1",
            "--time_based",
            "--group_reporting",
            "--randrepeat=0",
            "--norandommap",
            "--output-format=json",
        ]
    )
    # The engine says that it is connected before the JSON begins.
    read = json.loads(out[out.index("{\n") :])["jobs"][0]["read"]
    times = read["clat_ns"]["percentile"]
    return Measurement(
        read["iops"], read["bw_bytes"], times["50.000000"] / 1000, times["99.000000"] / 1000
    )


def start_ours(stage: Stage, recipe: str) -> tuple[Server, Span, dict[str, Any]]:
    """Serves the recipe's image, with all of it in the arena; also tells what was built."""
    image = f"oci:{make(RECIPES[recipe], ROOT / '.cache/images')}:{TAG}"
    base = [COMMAND, "--state-dir", str(stage.folder / "state")]
    built = json.loads(run([*base, "preload", image, "--json"]))
    layers = json.loads(run([*base, "inspect", image, "--json"]))["layers"]
    daemon = stage.start([*base, "serve", "--fill", "whole"])
    control = stage.folder / "state/control.sock"
    daemon.wait_until(control.exists)
    uri = run([*base, "export", image]).strip()
    # Reading all of it once is the surest way to have all of it.
    run(["nbdcopy", uri, "null:"])
    start = min(layer["offset_bytes"] for layer in layers if layer["size_bytes"])
    end = max(layer["offset_bytes"] + layer["size_bytes"] for layer in layers)
    return Server("cubecache", uri), Span(start, (end - start) >> 20 << 20), built


def start_peers(stage: Stage, disk: Path) -> list[Server]:
    """nbdkit and qemu-nbd on the same bytes as a file."""
    sockets = {name: stage.folder / f"{name}.sock" for name in ("nbdkit", "qemu-nbd")}
    nbdkit = ["nbdkit", "--foreground", "--readonly", "--unix", str(sockets["nbdkit"])]
    qemu = ["qemu-nbd", "--read-only", "--persistent", "--shared=16", "--format=raw"]
    started: dict[str, Process] = {
        "nbdkit": stage.start([*nbdkit, "file", str(disk)]),
        "qemu-nbd": stage.start([*qemu, "--socket", str(sockets["qemu-nbd"]), str(disk)]),
    }
    for name, process in started.items():
        process.wait_until(sockets[name].exists)
    return [Server(name, f"nbd+unix:///?socket={path}") for name, path in sockets.items()]


def push(limit: PushLimit, load: Workload, connections: int, seconds: int) -> Measurement:
    """One run of the smallest loop, which measures no single request."""
    block = int(load.block[:-1]) << {"k": 10, "m": 20}[load.block[-1]]
    random = load.pattern == "randread"
    rate = limit.replies_per_second(block, load.depth, connections, seconds, random=random)
    return Measurement(rate, rate * block, 0.0, 0.0)


def compare(  # noqa: PLR0917 - one caller, in this order
    servers: list[Server],
    limit: PushLimit,
    span: Span,
    loads: list[Workload],
    rounds: int,
    seconds: int,
) -> list[dict[str, Any]]:
    """Measures every workload with one connection and four, the servers in turn in each round."""
    rows = []
    for load in loads:
        for connections in (1, 4):
            runs: dict[str, list[Measurement]] = {server.name: [] for server in servers}
            runs["limit"] = []
            for number in range(rounds):
                # Each round begins with another server, so none always follows the same one.
                turn = number % len(servers)
                for server in servers[turn:] + servers[:turn]:
                    found = measure(server.uri, span, load, connections, seconds)
                    runs[server.name].append(found)
                runs["limit"].append(push(limit, load, connections, seconds))
            rows.append({"workload": load.name, "connections": connections} | summary(runs))
            print(table_row(rows[-1]), flush=True)
    return rows


def summary(runs: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Medians per server, every single run, and how many times faster ours was."""
    medians = {
        name: {
            field: statistics.median(getattr(found, field) for found in measured)
            for field in Measurement.__dataclass_fields__
        }
        for name, measured in runs.items()
    }
    ours = medians["cubecache"]["reads_per_second"]
    ratios = {name: ours / median["reads_per_second"] for name, median in medians.items()}
    del ratios["cubecache"]
    share = ratios.pop("limit")
    singles = {
        name: [round(found.reads_per_second) for found in measured]
        for name, measured in runs.items()
    }
    return {
        "medians": medians,
        "ratios": ratios,
        "share_of_limit": share,
        "runs_reads_per_second": singles,
    }


def table_head() -> str:
    """The head of the Markdown table."""
    return (
        "| workload | connections | cubecache | nbdkit file | qemu-nbd | limit "
        "| / nbdkit | / qemu-nbd | / limit | p50 us: ours, nbdkit, qemu-nbd |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )


def table_row(row: dict[str, Any]) -> str:
    """One row: reads per second and bandwidth of each, our ratios, and latencies."""
    cells = [
        f"{row['medians'][name]['reads_per_second']:,.0f}/s "
        f"{row['medians'][name]['bytes_per_second'] / 1e6:,.0f} MB/s"
        for name in ("cubecache", "nbdkit", "qemu-nbd", "limit")
    ]
    ratios = [f"{row['ratios'][name]:.2f}" for name in ("nbdkit", "qemu-nbd")]
    ratios.append(f"{row['share_of_limit']:.2f}")
    latencies = (row["medians"][name]["median_us"] for name in ("cubecache", "nbdkit", "qemu-nbd"))
    ratios.append(", ".join(f"{each:.0f}" for each in latencies))
    return f"| {' | '.join([row['workload'], str(row['connections']), *cells, *ratios])} |"


def main() -> int:
    """Runs the comparison; returns 1 where ours is behind at 4 KiB, depth 32, one connection."""
    parser = argparse.ArgumentParser(description="Compare NBD servers on the same bytes.")
    parser.add_argument("--image", default="python-numpy", choices=sorted(RECIPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each run, after 1 of warming")
    parser.add_argument("--only", help="only workloads whose name holds this text")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/nbd_read.json")
    chosen = parser.parse_args()
    loads = [load for load in WORKLOADS if chosen.only is None or chosen.only in load.name]
    with Stage() as stage:
        ours, span, built = start_ours(stage, chosen.image)
        disk = stage.folder / "disk.img"
        run(["nbdcopy", ours.uri, str(disk)])
        servers = [ours, *start_peers(stage, disk)]
        limit = PushLimit.build(stage.folder, disk, span.offset, span.length)
        for peer in servers[1:]:
            run(["qemu-img", "compare", "-f", "raw", "-F", "raw", ours.uri, peer.uri])
        about = {
            "machine": machine(),
            "load_before": os.getloadavg()[0],
            "commit": commit(),
            "versions": {
                "fio": version("fio", "--version"),
                "nbdkit": version("nbdkit", "--version"),
                "qemu-nbd": version("qemu-nbd", "--version"),
            },
            "image": chosen.image,
            "block_image": built["block_image"],
            "disk_bytes": built["size_bytes"],
            "read_bytes": span.length,
            "rounds": chosen.rounds,
            "seconds": chosen.seconds,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        print(f"commit {about['commit']}; {about['machine']}; load {about['load_before']:.1f}")
        print(f"{', '.join(about['versions'].values())}; {chosen.image}, {span.length >> 20} MiB")
        if float(str(about["load_before"])) > 1:
            print("this machine is busy: what follows says little", file=sys.stderr)
        print(table_head(), flush=True)
        rows = compare(servers, limit, span, loads, chosen.rounds, chosen.seconds)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print(f"written to {chosen.output}")
    # One loop is one core: with four connections the others may use every core, and ours does not.
    behind = [
        row
        for row in rows
        if row["connections"] == 1 and "4 KiB" in row["workload"] and "depth 32" in row["workload"]
        if min(row["ratios"].values()) < 1
    ]
    for row in behind:
        print(f"nbd_read: behind at {row['workload']}, one connection", file=sys.stderr)
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main())
