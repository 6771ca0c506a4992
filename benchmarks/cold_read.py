"""Cold reads through `cubecache serve` beside a plain parallel download of the same objects.

One image with one large file of noise (nothing is gained by compression) lies in `rclone serve s3`.
Every round compares bytes per second, from an empty host cache each time:

  random      libnbd reads 4 KiB of every chunk once, in random order, 32 under way, no fill: each
              read brings a chunk. Beside it, curl downloads the packs in ranges of a chunk's size,
              in random order, 32 at once.
  whole file  fio reads all of the file, at random (64 reads of each chunk: all but the first are
              hits) and in sequence, with no fill and with the default one. Beside it, curl
              downloads the packs in ranges of 4 MiB, 16 at once.

    ./tools/bench cold_read [--megabytes 256] [--rounds 3] [--first-byte-ms 20]
                            [--bytes-per-second 100000000] [--sealed]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import nbd  # type: ignore[import-untyped]  # libnbd has no types
from botocore.config import Config
from imagemaker.entries import EPOCH, Entry, write_tar
from imagemaker.layout import LayerSource, Settings, write_layout
from imagemaker.make import TAG
from testbed.machine import ROOT, commit, machine
from testbed.processes import Stage
from testbed.servers import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    start_object_store,
    start_proxy,
    store_environment,
)

COMMAND = str(ROOT / ".venv/bin/cubecache")
CHUNK = 256 << 10
BLOCK = 4 << 10
DEPTH = 32
PATIENCE = 600


@dataclass(frozen=True)
class Reader:
    """One way of reading the file: fio's pattern, block size and depth."""

    name: str
    pattern: str
    block: str
    depth: int


@dataclass(frozen=True)
class Download:
    """One way of fetching the packs: bytes of a range, ranges at once, their order."""

    name: str
    part: int
    parallel: int
    shuffled: bool


PLAIN = Download("plain download", 4 << 20, 16, shuffled=False)
PLAIN_CHUNKS = Download("plain download of chunks", CHUNK, DEPTH, shuffled=True)
READERS = (
    Reader("4 KiB random, whole file, depth 32", "randread", "4k", 32),
    Reader("1 MiB sequential, depth 8", "read", "1m", 8),
    Reader("128 KiB sequential, depth 2", "read", "128k", 2),
)
RANDOM = f"4 KiB of every chunk, random, depth {DEPTH}"
FILLS = ("none", "default")


def run(command: list[str], environment: Mapping[str, str]) -> str:
    """Runs a program that must succeed; returns its stdout."""
    outcome = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=PATIENCE
    )
    if outcome.returncode:
        raise SystemExit(f"cold_read: {' '.join(command[:4])} failed:\n{outcome.stderr[-2000:]}")
    return outcome.stdout


def read_every_chunk(uri: str, offset: int, size: int) -> float:
    """Seconds to read 4 KiB of every chunk of a file that begins at `offset`, in random order."""
    dice = random.Random(3)
    places = [at + dice.randrange(CHUNK // BLOCK) * BLOCK for at in range(0, size, CHUNK)]
    dice.shuffle(places)
    client = nbd.NBD()
    client.connect_uri(uri)
    begin = time.perf_counter()
    while places or client.aio_in_flight():
        while places and client.aio_in_flight() < DEPTH:
            client.aio_pread(nbd.Buffer(BLOCK), offset + places.pop())
        done = client.aio_peek_command_completed()
        if done > 0:
            client.aio_command_completed(done)
        elif client.poll(60_000) != 1:
            raise SystemExit("cold_read: nothing came for a minute")
    seconds = time.perf_counter() - begin
    client.shutdown()
    return seconds


@dataclass(frozen=True)
class Bench:
    """The stage with the store's URL and the image in it."""

    stage: Stage
    endpoint: str
    url: str
    image: str
    environment: Mapping[str, str]

    def download(self, way: Download) -> float:
        """Bytes per second of curl fetching all packs by ranges, many at once."""
        client: Any = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
        )
        ranges: list[list[str]] = []
        total = 0
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix="images/v1/default/packs/"
        )
        for item in [item for page in pages for item in page["Contents"]]:
            where = {"Bucket": BUCKET, "Key": item["Key"]}
            url = client.generate_presigned_url("get_object", where)
            for at in range(0, item["Size"], way.part):
                end = min(at + way.part, item["Size"])
                ranges.append([f'url = "{url}"', f"range = {at}-{end - 1}", "output = /dev/null"])
            total += item["Size"]
        config = self.stage.folder / "curl"
        if way.shuffled:
            random.Random(2).shuffle(ranges)
        config.write_text("\nnext\n".join("\n".join(lines) for lines in ranges) + "\n")
        begin = time.perf_counter()
        command = ["curl", "-sS", "--fail", "--noproxy", "*", "-Z", "--parallel-immediate"]
        run([*command, "--parallel-max", str(way.parallel), "-K", str(config)], self.environment)
        return total / (time.perf_counter() - begin)

    @contextmanager
    def cold(self, fill: str) -> Iterator[tuple[str, int, int]]:
        """A daemon with an empty cache: the image's URI, the layer's offset and its bytes."""
        state = self.stage.folder / "cold"
        shutil.rmtree(state, ignore_errors=True)
        base = [COMMAND, "--state-dir", str(state), "--store", self.url]
        more = [] if fill == "default" else ["--fill", fill]
        daemon = self.stage.start([*base, "serve", *more], environment=self.environment)
        try:
            daemon.wait_until((state / "control.sock").exists)
            described = json.loads(run([*base, "inspect", self.image, "--json"], self.environment))
            (layer,) = described["layers"]
            uri = run([*base, "export", self.image], self.environment).strip()
            yield uri, layer["offset_bytes"], layer["size_bytes"] >> 20 << 20
        except SystemExit:
            print(daemon.log.read_text()[-4000:])
            raise
        finally:
            daemon.stop(60)

    def read_chunks(self) -> float:
        """Bytes of chunks per second that reads of 4 KiB each bring."""
        with self.cold("none") as (uri, offset, size):
            return size / read_every_chunk(uri, offset, size)

    def read(self, reader: Reader, fill: str) -> float:
        """Bytes per second of fio reading the file once."""
        with self.cold(fill) as (uri, offset, size):
            out = run(
                [
                    "fio", "--name=cold", "--ioengine=nbd", f"--uri={uri}",
                    f"--rw={reader.pattern}", f"--bs={reader.block}", f"--iodepth={reader.depth}",
                    f"--offset={offset}", f"--size={size}", "--output-format=json",
                ],
                self.environment,
            )  # fmt: skip
            job = json.loads(out[out.index("{\n") :])["jobs"][0]["read"]
            return float(job["io_bytes"] / job["runtime"] * 1000)


def prepare(stage: Stage, arguments: argparse.Namespace) -> Bench:
    """A store with the image in it; what is read later passes the proxy, where one is asked for."""
    # Its read-ahead of 16 MiB would cost more processor time than a small range is worth.
    store = start_object_store(stage, "--buffer-size", "0")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUBECACHE_", "AWS_"))}
    environment |= store_environment()
    if arguments.sealed:
        path = stage.folder / "secrets"
        run([COMMAND, "secrets", "new", str(path)], environment)
        environment["CUBECACHE_ENCRYPTION_SECRETS"] = f"file:{path}"
    layout = stage.folder / "layout"
    content = random.Random(1).randbytes(arguments.megabytes << 20)
    tar = stage.folder / "layer.tar"
    tar.write_bytes(write_tar([Entry("large", content=content)]))
    write_layout(layout, TAG, [LayerSource(tar, "none", "cold_read")], Settings(), epoch=EPOCH)
    image = f"oci:{layout}:{TAG}"
    base = [COMMAND, "--state-dir", str(stage.folder / "builder"), "--store", store.url()]
    run([*base, "preload", image], environment)
    endpoint = store.endpoint
    if arguments.first_byte_ms or arguments.bytes_per_second:
        endpoint = start_proxy(
            stage,
            store.endpoint,
            first_byte_ms=arguments.first_byte_ms,
            bytes_per_second=arguments.bytes_per_second,
        ).endpoint
    return Bench(stage, endpoint, store.url(endpoint), image, environment)


def main() -> None:
    """Prints a table and writes .cache/bench/cold_read.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-byte-ms", type=float, default=0)
    parser.add_argument("--bytes-per-second", type=int, default=0)
    parser.add_argument("--sealed", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {}
    with Stage() as stage:
        bench = prepare(stage, arguments)
        load = os.getloadavg()[0]
        for _ in range(arguments.rounds):
            plain_chunks = bench.download(PLAIN_CHUNKS)
            found.setdefault(f"{PLAIN_CHUNKS.name}, MB/s", []).append(plain_chunks / 1e6)
            found.setdefault(RANDOM, []).append(bench.read_chunks() / plain_chunks)
            plain = bench.download(PLAIN)
            found.setdefault(f"{PLAIN.name}, MB/s", []).append(plain / 1e6)
            for reader in READERS:
                for fill in FILLS:
                    rate = bench.read(reader, fill)
                    name = f"{reader.name}, fill {fill}"
                    found.setdefault(name, []).append(rate / plain)
                    print(f"{name}: {rate / 1e6:.0f} MB/s", flush=True)
    rows = {name: statistics.median(values) for name, values in found.items()}
    answer = {
        "medians": rows,
        "runs": found,
        "arguments": vars(arguments),
        "commit": commit(),
        "machine": machine(),
        "load": load,
    }
    where = ROOT / ".cache/bench/cold_read.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(answer, indent=2))
    for name, value in rows.items():
        runs = ", ".join(f"{run:.2f}" for run in found[name])
        print(f"| {name} | {value:.2f} | {runs} |")


if __name__ == "__main__":
    Path(ROOT / ".cache").mkdir(exist_ok=True)
    main()
