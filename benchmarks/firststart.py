"""The first ever start: an image that nobody has preloaded, its store slow to write to.

A daemon's service builds an image from an OCI layout; what it stores passes a bound of bytes per
second. Measured from the request: when the image can be exported, when a client has read its first
and its last byte through NBD, when it is stored. Beside it, the same build without any bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbd  # type: ignore[import-untyped]  # libnbd has no types
from imagemaker.make import make
from imagemaker.recipes import RECIPES
from testbed.machine import ROOT, commit, machine

from imagecache.composition import ImageRequest
from imagecache.daemon.service import ExportRequest, Service
from imagecache.settings import CacheSection, Settings

CACHE = ROOT / ".cache/images"
STEP_BYTES = 1 << 20


class SlowStore:
    """A store that takes so many bytes per second, over all puts together."""

    def __init__(self, inner: Any, bytes_per_second: float) -> None:
        self._inner = inner
        self._rate = bytes_per_second
        self._free_at = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        """As the inner store, after the time that the bytes take."""
        size = len(body) if isinstance(body, bytes) else await asyncio.to_thread(_size, body)
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + size / self._rate
        await asyncio.sleep(self._free_at - now)
        written: bool = await self._inner.put(key, body, only_if_absent=only_if_absent)
        return written


def _size(path: Path) -> int:
    return path.stat().st_size


@dataclass(frozen=True)
class Row:
    """Seconds from the request of one first start."""

    bound: str
    readable: float
    first_byte: float
    all_read: float
    stored: float


def read_all(uri: str, size: int) -> float:
    """Reads the whole disk; the time when its first block was there."""
    client = nbd.NBD()
    client.connect_uri(uri)
    client.pread(4096, 0)
    first = time.monotonic()
    for at in range(0, size, STEP_BYTES):
        client.pread(min(STEP_BYTES, size - at), at)
    client.shutdown()
    return first


async def first_start(image: str, folder: Path, bytes_per_second: float | None) -> Row:
    """One build with a reader beside it."""
    settings = Settings(
        state_dir=folder / "state",
        store_url=(folder / "store").as_uri(),
        cache=CacheSection(budget_bytes=8 << 30, fill="none"),
    )
    service = await Service.open(settings)
    try:
        if bytes_per_second is not None:
            store: Any = SlowStore(service.catalog.store, bytes_per_second)
            service.catalog.store = store
        request = ImageRequest.parse(image, None, "erofs")
        begin = time.monotonic()
        (job,) = await service.jobs.submit([request])
        while not (job.readable or job.ended):
            await job.watch(job.version, 1)
        export = await service.export(ExportRequest(request))
        readable = time.monotonic()
        first = await asyncio.to_thread(read_all, export.uri, export.record.size_bytes)
        everything = time.monotonic()
        while not job.ended:
            await job.watch(job.version, 1)
        stored = begin + (job.result or {})["seconds"]
        bound = "none" if bytes_per_second is None else f"{bytes_per_second / 1e6:.0f} MB/s"
        return Row(bound, readable - begin, first - begin, everything - begin, stored - begin)
    finally:
        await service.close()


def main() -> None:
    """Runs each bound once."""
    parser = argparse.ArgumentParser(description="First starts of an image that is being stored.")
    parser.add_argument("--image", default="openjdk", choices=sorted(RECIPES))
    parser.add_argument("--bounds", nargs="*", type=float, default=[10.0, 50.0], metavar="MB/S")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/firststart.json")
    chosen = parser.parse_args()
    image = f"oci:{make(RECIPES[chosen.image], CACHE)}:latest"
    about = {
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "commit": commit(),
        "image": chosen.image,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    print(f"commit {about['commit']}; {about['machine']}; load {about['load_before']:.1f}")
    print("| uploads | can be exported | first block read | whole disk read | stored |")
    print("|---|---|---|---|---|")
    rows = []
    for bound in [*(each * 1e6 for each in chosen.bounds), None]:
        with tempfile.TemporaryDirectory(prefix="cc-first-") as folder:
            row = asyncio.run(first_start(image, Path(folder), bound))
        rows.append(row)
        times = (row.readable, row.first_byte, row.all_read, row.stored)
        print(f"| {row.bound} | " + " | ".join(f"{x:.2f}" for x in times) + " |", flush=True)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    written = {"about": about, "rows": [asdict(row) for row in rows]}
    chosen.output.write_text(json.dumps(written, indent=1) + "\n")
    print(f"written to {chosen.output}")


if __name__ == "__main__":
    main()
