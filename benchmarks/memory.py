"""What the daemon holds: resident memory idle and with a hundred exports, and what an attach takes.

A disk of `--gigabytes` (10), a chunk for each 256 KiB of it, is built by `cubecache preload` into a
file store, of bytes that compress well, so that the store is small; `--keep FOLDER` keeps that
store for the next run. Then a daemon with an empty arena is asked for `--exports` (100) exports,
each on a socket of its own, each with a client that reads here and there. Memory is all that the
daemon has resident but the mapped arena. Goals: 80 MB idle, 150 MB with the exports, and 100 ms for
an attach whose manifest is on the host (timed at the client of the control API).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nbd  # type: ignore[import-untyped]  # libnbd has no types
from large import text_layer, write_layout
from processtree import measured
from testbed.machine import ROOT, commit, machine
from testbed.processes import Process, Stage

from imagecache.composition import opened_catalog
from imagecache.settings import Settings, load_settings
from preload.client import Client, ExportHandle, connect

COMMAND = str(ROOT / ".venv/bin/cubecache")
SETTLE_SECONDS = 3.0
READS = 50
GOALS = {"idle_bytes": 80 << 20, "exports_bytes": 150 << 20, "attach_seconds": 0.1}


def resident(pid: int) -> dict[str, int]:
    """Bytes resident in a process: of the mapped arena, and of all else, anonymous ones apart."""
    found = {"arena": 0, "rest": 0, "anonymous": 0}
    mapping = "rest"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0]:
            mapping = "arena" if line.endswith("/arena/slots") else "rest"
        elif name == "Rss":
            found[mapping] += int(value.split()[0]) << 10
        elif name == "Anonymous":
            found["anonymous"] += int(value.split()[0]) << 10
    return found


def built(folder: Path, gigabytes: float) -> str:
    """The reference of the image; its store, `folder`/store, is made where it is missing."""
    name = f"oci:{folder / 'image'}:latest"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        layers: list[Callable[[tarfile.TarFile], None]] = [
            partial(text_layer, layer=n, size=int(gigabytes * 1e9) // 4) for n in range(4)
        ]
        write_layout(folder / "image", layers)
        command = [COMMAND, "--state-dir", str(folder / "builder"), "--store", store_of(folder)]
        measured([[*command, "preload", name, "--json"]])
        # The daemon asks for names alone: the blobs of the layers are no longer needed.
        shutil.rmtree(folder / "builder")
        for blob in (folder / "image/blobs/sha256").iterdir():
            if blob.stat().st_size > 1 << 20:
                blob.unlink()
        (folder / "done").touch()
    return name


def store_of(folder: Path) -> str:
    """The store's URL."""
    return (folder / "store").as_uri()


def read_about(uri: str, seed: int) -> None:
    """A client that reads 4 KiB here and there, and goes."""
    client = nbd.NBD()
    client.connect_uri(uri)
    dice = random.Random(seed)
    for _ in range(READS):
        client.pread(4096, dice.randrange(client.get_size() - 4096) // 4096 * 4096)
    client.shutdown()


async def attach(
    client: Client, reference: str, socket: Path, fill: str | None
) -> tuple[float, ExportHandle]:
    """One export on its own socket; (seconds, handle)."""
    begin = time.perf_counter()
    handle = await client.export(reference, socket=socket, fill=fill)
    return time.perf_counter() - begin, handle


async def measure(
    settings: Settings, process: Process, reference: str, exports: int, fill: str | None
) -> dict[str, Any]:
    """The figures of one daemon."""
    await asyncio.sleep(SETTLE_SECONDS)
    found: dict[str, Any] = {"idle": resident(process.child.pid)}
    async with connect(settings, start=False) as client:
        sockets = Path(tempfile.mkdtemp(prefix="cc-"))
        try:
            _, handle = await attach(client, reference, sockets / "first", fill)
            found["disk_bytes"] = handle.size_bytes
            # The same again, by a daemon that has let go of the map: its objects are on the host.
            again = []
            for _ in range(5):
                await client.unexport(handle.name, force=True)
                await asyncio.sleep(0.3)
                seconds, handle = await attach(client, reference, sockets / "first", fill)
                again.append(seconds)
            found["attach_seconds"] = again
            beside, handles = [], [handle]
            for number in range(exports - 1):
                seconds, more = await attach(client, reference, sockets / str(number), fill)
                beside.append(seconds)
                handles.append(more)
            found["attach_beside_others_seconds"] = statistics.median(beside) if beside else None
            for number, handle in enumerate(handles):
                await asyncio.to_thread(read_about, handle.uri, number)
            found["exports_right_after"] = resident(process.child.pid)
            await asyncio.sleep(SETTLE_SECONDS)
            found["exports"] = resident(process.child.pid)
        finally:
            shutil.rmtree(sockets, ignore_errors=True)
    return found


async def chunks_of(settings: Settings) -> int:
    """How many chunks the store's one image has."""
    async with opened_catalog(settings) as (_, catalog):
        root = await anext(aiter(catalog.roots()))
        return len((await catalog.block_manifest(root)).chunks)


def main() -> None:
    """Builds the image where it is missing, measures, prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--exports", type=int, default=100)
    parser.add_argument("--fill", choices=("whole", "hot", "none"), help="default: the daemon's")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the image's store stays")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/memory.json")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        stage = stack.enter_context(Stage())
        folder = (chosen.keep or stage.folder / "built").absolute()
        needed = int(chosen.gigabytes * 2.5e9)
        if not (folder / "done").exists() and shutil.disk_usage(stage.folder).free < needed:
            raise SystemExit(f"memory: {stage.folder} needs {needed / 1e9:.0f} GB free")
        reference = built(folder, chosen.gigabytes)
        settings = load_settings(
            os.environ, state_dir=stage.folder / "host", store=store_of(folder)
        )
        chunks = asyncio.run(chunks_of(settings))
        command = [COMMAND, "--state-dir", str(settings.state_dir), "--store", settings.store_url]
        process = stage.start([*command, "serve"])
        process.wait_until(lambda: b"ready:" in process.log.read_bytes(), 60)
        figures = asyncio.run(measure(settings, process, reference, chosen.exports, chosen.fill))
    best = {
        "idle_bytes": figures["idle"]["rest"],
        "exports_bytes": figures["exports"]["rest"],
        "attach_seconds": statistics.median(figures["attach_seconds"]),
    }
    found = {
        "machine": machine(),
        "commit": commit(),
        "load": os.getloadavg()[0],
        "exports": chosen.exports,
        "chunks": chunks,
        "fill": chosen.fill,
        **best,
        "figures": figures,
        "kept": {name: best[name] <= goal for name, goal in GOALS.items()},
    }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    print(f"idle {best['idle_bytes'] / 1e6:.0f} MB (goal 80 MiB)")
    print(
        f"{chosen.exports} exports of {figures['disk_bytes'] / 1e9:.1f} GB: "
        f"{best['exports_bytes'] / 1e6:.0f} MB beyond the arena (goal 150 MiB)"
    )
    print(f"attach, manifest on the host: {best['attach_seconds'] * 1000:.0f} ms (goal 100 ms)")


if __name__ == "__main__":
    main()
