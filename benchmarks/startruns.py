"""One start of each kind, timed: lazily on a mount, in a microVM, and after a full pull."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from dataclasses import dataclass, field

from chrooted import LONGEST_SECONDS, run_program, writable
from starthosts import COMMAND, Bench
from startloads import Load

from cube.mounting import mount_image, umount_image
from imagecache.settings import Settings


@dataclass
class Run:
    """One start: seconds from nothing to the program's ready line, and what passed the shaper."""

    kind: str
    ready: float
    bytes: int = 0
    gets: int = 0
    parts: dict[str, float] = field(default_factory=dict)


async def lazily(bench: Bench, settings: Settings, load: Load, reference: str, kind: str) -> Run:
    """One lazy start on a running daemon; unmounted when it returns."""
    bench.objects_proxy.reset()
    if bench.vm:
        return await asyncio.to_thread(in_machine, bench, settings, load, reference, kind)
    folder = bench.fresh_folder()
    directory = folder / "root"
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    await mount_image(settings, directory, reference, fill=None, platform=None, face="erofs")
    mounted = time.monotonic()
    try:
        with writable(directory, folder / "over") as root:
            layered = time.monotonic()
            ready = await asyncio.to_thread(run_program, root, load)
            counts = bench.objects_proxy.counters()
    finally:
        await umount_image(settings, directory)
    parts = {"mount": mounted - begin, "program": ready - layered}
    return Run(kind, ready - begin - (layered - mounted), *passed(counts), parts)


def in_machine(bench: Bench, settings: Settings, load: Load, reference: str, kind: str) -> Run:
    """One start in a microVM: until the program's first output, by the machine's own clock."""
    command = [COMMAND, "--state-dir", str(settings.state_dir), "--store", settings.store_url]
    command += ["run", "--json", "--memory", "1G"]
    outcome = subprocess.run(
        [*command, reference, "--", *load.command],
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_SECONDS,
    )
    counts = bench.objects_proxy.counters()
    if outcome.returncode:
        raise SystemExit(f"startup: {load.image} in a microVM: {outcome.stderr[-2000:]}")
    answer = json.loads(outcome.stdout.splitlines()[-1])
    exported, timeline = answer["export_seconds"], answer["timeline"]
    ready = exported + timeline.get("first-output", timeline.get("exit", 0.0))
    return Run(kind, ready, *passed(counts), {"export": exported})


def passed(counts: dict[str, dict[str, int]]) -> tuple[int, int]:
    """Bytes and GETs of objects that went through a shaper."""
    classes = (counts["ranges"], counts["objects"])
    return sum(x["bytes"] for x in classes), sum(x["requests"] for x in classes)


def pulled(bench: Bench, load: Load, name: str) -> Run:
    """Pull everything, unpack it, start the program in the tree."""
    folder = bench.stage.folder / "pull"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "root").mkdir(parents=True)
    bench.registry_proxy.reset()
    begin = time.monotonic()
    source = f"docker://{bench.registry_proxy.endpoint.removeprefix('http://')}/{name}"
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]
    subprocess.run([*command, source, f"dir:{folder}/image"], check=True)
    pulled_at = time.monotonic()
    manifest = json.loads((folder / "image/manifest.json").read_bytes())
    for layer in manifest["layers"]:
        blob = folder / "image" / layer["digest"].partition(":")[2]
        unpack = [
            "tar",
            "-xf",
            str(blob),
            "-C",
            str(folder / "root"),
            "--numeric-owner",
        ]
        unpack += ["--zstd"] if layer["mediaType"].endswith("zstd") else []
        unpack += ["-z"] if layer["mediaType"].endswith("gzip") else []
        # static-busybox replaces a directory by a file, which tar refuses and goes on.
        subprocess.run(unpack, check=load.image != "static-busybox", stderr=subprocess.DEVNULL)
    unpacked = time.monotonic()
    counts = bench.registry_proxy.counters()
    with writable(folder / "root", folder / "over") as root:
        layered = time.monotonic()
        ready = run_program(root, load)
    parts = {"pull": pulled_at - begin, "unpack": unpacked - pulled_at, "program": ready - layered}
    return Run("pull", ready - begin - (layered - unpacked), *passed(counts), parts)
