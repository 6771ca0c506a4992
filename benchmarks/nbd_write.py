"""Writes over NBD: an overlay of nbdserver beside `nbdkit --filter=cow` on the same base file.

fio's nbd engine writes to each in turn, round by round, each run on a fresh overlay; the medians of
the rounds are compared. Neither is asked to flush: both answer when the kernel has the data. Beside
the rate stands the server's processor time for each write, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from testbed.machine import ROOT, commit, machine, version
from testbed.processes import Stage

WORKLOADS = (
    ("4 KiB random, depth 1", "4k", 1, "randwrite"),
    ("4 KiB random, depth 32", "4k", 32, "randwrite"),
    ("64 KiB random, depth 16", "64k", 16, "randwrite"),
    ("1 MiB sequential, depth 8", "1m", 8, "write"),
)
NAMES = ("nbdserver", "nbdkit cow")


def write_once(
    name: str, base: Path, load: tuple[str, str, int, str], connections: int, seconds: int
) -> tuple[float, float]:
    """One run of fio against a fresh server: writes per second, processor seconds per write."""
    _label, block, depth, pattern = load
    with Stage() as stage:
        path = stage.folder / "nbd.sock"
        if name == "nbdserver":
            command = [sys.executable, "-m", "nbdserver.cli", "--unix", str(path)]
            command += ["--overlay", str(stage.folder / "overlay"), str(base)]
        else:
            command = ["nbdkit", "--foreground", "--unix", str(path), "--filter=cow"]
            command += ["file", str(base)]
        server = stage.start(command)
        server.wait_until(path.exists)
        fio = ["fio", "--name=write", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={path}"]
        fio += [f"--rw={pattern}", f"--bs={block}", f"--iodepth={depth}"]
        fio += [f"--numjobs={connections}", f"--size={base.stat().st_size}"]
        fio += [f"--runtime={seconds}", "--time_based", "--group_reporting"]
        fio += ["--norandommap", "--output-format=json"]
        before = processor_seconds(server.child.pid)
        done = subprocess.run(fio, check=True, capture_output=True, text=True)
        out = done.stdout
        written = json.loads(out[out.index("{\n") :])["jobs"][0]["write"]
        spent = processor_seconds(server.child.pid) - before
        return float(written["iops"]), spent / max(written["total_ios"], 1)


def processor_seconds(process: int) -> float:
    """User and system time of a process so far (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Runs the comparison; returns 1 when ours is behind at 4 KiB, depth 32."""
    parser = argparse.ArgumentParser(description="Compare copy-on-write NBD servers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--only", help="only workloads whose name holds this text")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/nbd_write.json")
    chosen = parser.parse_args()
    folder = ROOT / ".cache/bench"
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "nbd_write.base"
    with base.open("wb") as file:
        for _ in range(chosen.size_mib):
            file.write(os.urandom(1 << 20))
    print(f"commit {commit()}; {machine()}; load {os.getloadavg()[0]:.1f}")
    print(f"{version('fio', '--version')}; {version('nbdkit', '--version')}")
    print("| workload | connections | nbdserver | nbdkit cow | ratio | CPU per write, ours / cow |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    for load in WORKLOADS:
        if chosen.only is not None and chosen.only not in load[0]:
            continue
        for connections in (1, 4):
            runs: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
            for number in range(chosen.rounds):
                # Each round begins with another server, so none always follows the same one.
                for name in NAMES if number % 2 else NAMES[::-1]:
                    runs[name].append(write_once(name, base, load, connections, chosen.seconds))
            ours, theirs = (statistics.median(rate for rate, _ in runs[name]) for name in NAMES)
            spent = [statistics.median(cpu for _, cpu in runs[name]) * 1e6 for name in NAMES]
            rows.append({"workload": load[0], "connections": connections, "runs": runs})
            rows[-1]["ratio"] = ours / theirs
            cells = f"{ours:,.0f}/s | {theirs:,.0f}/s | {ours / theirs:.2f}"
            cells += f" | {spent[0]:.1f} / {spent[1]:.1f} us"
            print(f"| {load[0]} | {connections} | {cells} |", flush=True)
    base.unlink()
    about = {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    chosen.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    shutil.rmtree(folder / "overlay", ignore_errors=True)
    behind = [row for row in rows if row["workload"] == WORKLOADS[1][0] and row["ratio"] < 1]
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main())
