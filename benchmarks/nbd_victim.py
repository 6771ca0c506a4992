"""A victim's latency under attack, and what an idle client costs: `nbdserver` over a file.

The victim is fio's nbd engine, 4 KiB random reads, one in flight; beside it one attack after
another of `nbdattacks.py`, in turn with quiet runs. Medians of the rounds. Attacker, victim and
server share this machine's processors. What of a longer latency is only the processors' doing, the
column `beside` tells: the same victim on one server while another server is attacked.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nbdattacks import ATTACKS, connected
from testbed.machine import ROOT, commit, machine, version
from testbed.processes import Process, Stage

QUIET = "quiet"


def serve(stage: Stage, disk: Path, name: str) -> tuple[Process, Path]:
    """An nbdserver whose clients may have 1,000 neighbours; writes go to an overlay."""
    path = stage.folder / f"{name}.sock"
    command = [sys.executable, "-m", "nbdserver.cli", "--unix", str(path)]
    server = stage.start([*command, "--overlay", str(stage.folder / name), str(disk)])
    server.wait_until(path.exists)
    return server, path


def victim(path: Path, seconds: int) -> tuple[float, float]:
    """Microseconds that half and 99 % of the reads took at most."""
    fio = ["fio", "--name=victim", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={path}"]
    fio += ["--rw=randread", "--bs=4k", "--iodepth=1", "--time_based", f"--runtime={seconds}"]
    fio += ["--size=64m", "--randrepeat=0", "--norandommap", "--output-format=json"]
    done = subprocess.run(fio, check=True, capture_output=True, text=True, timeout=seconds + 120)
    out = done.stdout
    times = json.loads(out[out.index("{\n") :])["jobs"][0]["read"]["clat_ns"]["percentile"]
    return times["50.000000"] / 1000, times["99.000000"] / 1000


def attacked(name: str, target: Path, path: Path, seconds: int) -> tuple[float, float]:
    """The victim at `path` while `target` is attacked."""
    if name == QUIET:
        return victim(path, seconds)
    program = str(Path(__file__).with_name("nbdattacks.py"))
    with Stage() as stage:
        attacker = stage.start([sys.executable, program, name, str(target)])
        attacker.wait_until(lambda: "ready" in attacker.log.read_text())
        found = victim(path, seconds)
        if attacker.child.poll() is not None:
            raise SystemExit(f"nbd_victim: {name} ended:\n{attacker.log.read_text()[-2000:]}")
    return found


def memory_per_idle_client(stage: Stage, disk: Path, count: int) -> float:
    """Bytes of resident memory that each of `count` idle clients adds to the server."""
    server, path = serve(stage, disk, "crowded")
    crowd: list[socket.socket] = [connected(str(path)) for _ in range(50)]
    before = resident(server.child.pid)
    crowd += [connected(str(path)) for _ in range(count)]
    each = (resident(server.child.pid) - before) / count
    for sock in crowd:
        sock.close()
    return each


def resident(process: int) -> int:
    """Resident memory in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"nbd_victim: process {process} has no memory")


def main() -> int:
    """Runs the comparison; returns 1 where an attack more than doubles the victim's p99."""
    parser = argparse.ArgumentParser(description="Latency of a victim beside attackers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--clients", type=int, default=1000, help="idle clients for the memory")
    parser.add_argument("--only", choices=sorted(ATTACKS), help="one attack")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/nbd_victim.json")
    chosen = parser.parse_args()
    names = [QUIET, *([chosen.only] if chosen.only else ATTACKS)]
    about = {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    print(f"commit {about['commit']}; {about['machine']}; load {os.getloadavg()[0]:.1f}")
    print(version("fio", "--version"), flush=True)
    runs: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {"same": [], "beside": []} for name in names
    }
    with Stage() as stage:
        disk = stage.folder / "disk"
        disk.write_bytes(os.urandom(64 << 20))
        each = memory_per_idle_client(stage, disk, chosen.clients)
        print(f"memory per idle client, {chosen.clients} of them: {each / 1024:.1f} KiB")
        _server, path = serve(stage, disk, "attacked")
        _server, other = serve(stage, disk, "other")
        for number in range(chosen.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                runs[name]["same"].append(attacked(name, path, path, chosen.seconds))
                runs[name]["beside"].append(attacked(name, path, other, chosen.seconds))
    print("| attack | p50 us | p99 us | p99 / quiet | p99 us beside | / quiet beside |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows: list[dict[str, Any]] = []
    quiet = {
        where: statistics.median(p99 for _, p99 in runs[QUIET][where]) for where in runs[QUIET]
    }
    for name in names:
        middle = statistics.median(p50 for p50, _ in runs[name]["same"])
        tail, beside = (
            statistics.median(p99 for _, p99 in runs[name][where]) for where in ("same", "beside")
        )
        ratio, beside_ratio = tail / quiet["same"], beside / quiet["beside"]
        rows.append({"attack": name, "p50_us": middle, "p99_us": tail, "ratio": ratio})
        rows[-1] |= {"beside_p99_us": beside, "beside_ratio": beside_ratio, "runs": runs[name]}
        cells = f"{middle:,.0f} | {tail:,.0f} | {ratio:.2f} | {beside:,.0f} | {beside_ratio:.2f}"
        print(f"| {name} | {cells} |")
    result = {"about": about, "bytes_per_idle_client": each, "rows": rows}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["ratio"] > 2 for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
