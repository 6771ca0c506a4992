"""Reading one large file from its begin to its end, cold, against a plain parallel download.

An image with one file of `--megabytes` (2,000) of noise is stored behind a shaper (`--link far`: 20
ms and 100 MB/s, `near`: 5 ms and 1 GB/s). In one run, `--rounds` times in turn:

  download   the same bytes as parallel ranged GETs of `--get` bytes by `--connections` from the
             same store through the same shaper, thrown away
  ours       `cubecache serve` on a host that has nothing, fill off (`--fill` says otherwise), and a
             libnbd client that reads the file's bytes in order, `--depth` requests of 256 KiB
  mounted    as ours, read by dd from a lazy mount (`--mount`)

Goal: ours at least 0.8 of the download.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import boto3
import nbd  # type: ignore[import-untyped]  # libnbd has no types
from botocore.config import Config
from large import noise_layer, write_layout
from shaped import LINKS, Link
from testbed.machine import ROOT, commit, machine
from testbed.processes import Stage
from testbed.servers import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    Proxy,
    start_object_store,
    start_proxy,
    store_environment,
)

COMMAND = str(ROOT / ".venv/bin/cubecache")
PIECE = 256 << 10
NAME = "models/weights.bin"
GOAL = 0.8
LONGEST_SECONDS = 600


def cubecache(arguments: list[str], seconds: float = LONGEST_SECONDS) -> str:
    """A command that must succeed; its stdout."""
    return subprocess.run(
        [COMMAND, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | store_environment(),
        text=True,
        timeout=seconds,
    ).stdout


def pack_urls(endpoint: str) -> list[tuple[str, int]]:
    """A signed URL, through `endpoint`, and the size of every pack."""
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}, signature_version="s3v4"),
    )
    found = []
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for listed in page.get("Contents", ()):
            if "/packs/" in listed["Key"]:
                where = {"Bucket": BUCKET, "Key": listed["Key"]}
                url = client.generate_presigned_url("get_object", Params=where)
                found.append((url, int(listed["Size"])))
    return found


async def download(urls: list[tuple[str, int]], size: int, get: int, connections: int) -> float:
    """Seconds to fetch the first `size` bytes of the packs."""
    jobs: asyncio.Queue[tuple[str, int, int]] = asyncio.Queue()
    left = size
    for url, length in urls:
        for at in range(0, min(length, left), get):
            jobs.put_nowait((url, at, min(at + get, length) - 1))
        left -= min(length, left)
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections))

    async def worker() -> int:
        got = 0
        while not jobs.empty():
            url, first, last = jobs.get_nowait()
            async with session.get(url, headers={"Range": f"bytes={first}-{last}"}) as answer:
                answer.raise_for_status()
                async for piece in answer.content.iter_any():
                    got += len(piece)
        return got

    async with session:
        begin = time.monotonic()
        got = await asyncio.gather(*(worker() for _ in range(connections)))
        seconds = time.monotonic() - begin
    if sum(got) < size * 0.9:
        raise SystemExit(f"sequential: {sum(got)} bytes came, {size} were asked for")
    return seconds


def read_in_order(uri: str, offset: int, size: int, depth: int) -> float:
    """Seconds to read a range of an export in order, `depth` requests under way."""
    client = nbd.NBD()
    client.connect_uri(uri)
    begin = time.monotonic()
    at, end = offset, offset + size
    while at < end or client.aio_in_flight():
        while at < end and client.aio_in_flight() < depth:
            length = min(PIECE, end - at)
            client.aio_pread(nbd.Buffer(length), at)
            at += length
        done = client.aio_peek_command_completed()
        if done > 0:
            client.aio_command_completed(done)
        elif client.poll(60_000) != 1:
            raise SystemExit("sequential: nothing came for a minute")
    seconds = time.monotonic() - begin
    client.shutdown()
    return seconds


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bench:
    """One image in one store behind one shaper."""

    def __init__(self, stage: Stage, link: Link, megabytes: int) -> None:
        self.stage = stage
        self.cpu: list[float] = []
        self.store = start_object_store(stage)
        self.proxy: Proxy = start_proxy(
            stage,
            self.store.endpoint,
            first_byte_ms=link.first_byte_ms,
            bytes_per_second=link.bytes_per_second,
        )
        layer = partial(noise_layer, name=NAME, size=megabytes * 1_000_000)
        write_layout(stage.folder / "image", [layer])
        self.image = f"oci:{stage.folder / 'image'}:latest"
        host = ["--state-dir", str(stage.folder / "builder"), "--store", self.store.url()]
        cubecache([*host, "preload", self.image, "--json"])
        span = json.loads(cubecache([*host, "inspect", self.image, "/" + NAME, "--json"]))
        self.offset, self.size = int(span["offset_bytes"]), int(span["size_bytes"])

    def ours(self, *, fill: str, depth: int, mount: bool) -> float:
        """Seconds of one cold read."""
        state = self.stage.folder / "host"
        shutil.rmtree(state, ignore_errors=True)
        host = ["--state-dir", str(state), "--store", self.store.url(self.proxy.endpoint)]
        daemon = self.stage.start([COMMAND, *host, "serve"], os.environ | store_environment())
        daemon.wait_until(lambda: b"ready:" in daemon.log.read_bytes(), 60)
        try:
            if not mount:
                uri = cubecache([*host, "export", self.image, "--fill", fill]).strip()
                before = cpu_seconds(daemon.child.pid)
                seconds = read_in_order(uri, self.offset, self.size, depth)
                self.cpu.append(cpu_seconds(daemon.child.pid) - before)
                return seconds
            folder = self.stage.folder / "mounted"
            folder.mkdir(exist_ok=True)
            cubecache([*host, "mount", self.image, str(folder), "--fill", fill])
            try:
                begin = time.monotonic()
                command = ["dd", f"if={folder / NAME}", "of=/dev/null", "bs=1M", "status=none"]
                subprocess.run(command, check=True, timeout=LONGEST_SECONDS)
                return time.monotonic() - begin
            finally:
                cubecache([*host, "umount", str(folder)])
        finally:
            daemon.stop()


def main() -> None:
    """Runs the ways in turn and prints medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--link", choices=sorted(LINKS), default="far")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--get", type=int, default=4 << 20)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--fill", choices=("whole", "hot", "none"), default="none")
    parser.add_argument("--mount", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/sequential.json")
    chosen = parser.parse_args()
    link = LINKS[chosen.link]
    needed = chosen.megabytes * 4_000_000
    with Stage() as stage:
        if shutil.disk_usage(stage.folder).free < needed:
            raise SystemExit(f"sequential: {stage.folder} needs {needed / 1e9:.0f} GB free")
        bench = Bench(stage, link, chosen.megabytes)
        seconds: dict[str, list[float]] = {"download": [], "ours": []}
        for _ in range(chosen.rounds):
            urls = pack_urls(bench.proxy.endpoint)
            seconds["download"].append(
                asyncio.run(download(urls, bench.size, chosen.get, chosen.connections))
            )
            seconds["ours"].append(
                bench.ours(fill=chosen.fill, depth=chosen.depth, mount=chosen.mount)
            )
    rates = {name: bench.size / statistics.median(times) / 1e6 for name, times in seconds.items()}
    ratio = rates["ours"] / rates["download"]
    found: dict[str, Any] = {
        "machine": machine(),
        "commit": commit(),
        "load": os.getloadavg()[0],
        "link": link.name,
        "bytes": bench.size,
        "fill": chosen.fill,
        "mount": chosen.mount,
        "seconds": seconds,
        "megabytes_per_second": rates,
        "ours_of_download": ratio,
        "daemon_cpu_seconds": bench.cpu,
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(
        f"{link.name}: download {rates['download']:.0f} MB/s, ours {rates['ours']:.0f} MB/s: "
        f"{ratio:.2f} (goal {GOAL})"
    )


if __name__ == "__main__":
    main()
