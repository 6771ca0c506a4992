"""Time to ready of real programs: full pull and unpack, and lazy starts of several kinds.

Object store and registry stand behind a shaper (time to first byte, bandwidth). Each start begins
on a host that has nothing (fresh arena, fresh page cache of the disk) but a running daemon. Kinds:

  pull       skopeo and tar, then the program in the unpacked tree
  fill       ours, stored, nothing known and nothing predicted: demand and fill alone
  unlearned  ours, stored, nothing known: a host predicts by itself where the image is large
  predicted  ours as after any preload: a boot pack made from a prediction then
  profile    ours with one recording of this image
  previous   ours with a recording of the version before, carried over when this one was preloaded
  warm       ours a second time on the same host

Added delay is time to ready less that of the warm start; each kind is the median of its rounds.
Bytes and GETs are those that passed the shaper until the program was ready. `--vm` starts the
program in a microVM (`cubecache run`), else in a chroot over the lazy mount.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from imagemaker.layout import push
from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES, Packages, Recipe
from testbed.machine import ROOT, commit, machine
from testbed.processes import Process, Stage
from testbed.servers import (
    ObjectStore,
    Proxy,
    Registry,
    start_object_store,
    start_proxy,
    start_registry,
    store_environment,
)

from cube.mounting import mount_image, umount_image
from imagecache.composition import alias_name, opened_catalog
from imagecache.oci.reference import parse_reference
from imagecache.profile.profile import Profile
from imagecache.profile.starts import Starts
from imagecache.settings import Settings, load_settings
from preload.client import connect

COMMAND = str(ROOT / ".venv/bin/cubecache")
READY = "hello"
LONGEST_SECONDS = 180.0
KINDS = ("pull", "fill", "unlearned", "predicted", "profile", "previous", "warm")

_NGINX = """
printf 'daemon off; error_log stderr; pid /tmp/p; events{} http{ access_log off;
client_body_temp_path /tmp/b; proxy_temp_path /tmp/c; fastcgi_temp_path /tmp/d;
uwsgi_temp_path /tmp/e; scgi_temp_path /tmp/f;
server{ listen 127.0.0.1:8080; root /var/www/html; } }' >/tmp/n.conf
/usr/sbin/nginx -c /tmp/n.conf & while ! exec 3<>/dev/tcp/127.0.0.1/8080; do :; done 2>/dev/null
printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; read -r line <&3; echo "hello $line"; kill %1
"""
_POSTGRES = """
chmod 1777 /tmp; cd /tmp; export B=$(echo /usr/lib/postgresql/*/bin)
cat >/tmp/go <<'END'
$B/initdb -D /tmp/d --no-sync >/dev/null
$B/pg_ctl -D /tmp/d -w -o '-k /tmp -h ""' start >/dev/null
echo hello $($B/psql -h /tmp -Atc 'select version()' postgres)
$B/pg_ctl -D /tmp/d -m immediate stop >/dev/null
END
setpriv --reuid=postgres --regid=postgres --clear-groups bash /tmp/go
"""


@dataclass(frozen=True)
class Load:
    """What is started and what it reads: `reads` says it for the table's reader."""

    image: str
    command: tuple[str, ...]
    reads: str
    previous: str | None = None  # a recipe of its own for the version before
    added: str | None = "less"  # else: the package that this version has more than the one before


LOADS = (
    Load("python-numpy", ("python3", "/app/main.py"), "interpreter, numpy and its libraries",
         previous="python-numpy", added=None),
    Load("nginx", ("bash", "-c", _NGINX), "nginx, its modules, bash, one page"),
    Load("postgresql", ("bash", "-c", _POSTGRES), "initdb, server, psql"),
    Load("nodejs", ("nodejs", "/app/main.js"), "node and its libraries"),
    Load("openjdk", ("java", "-version"), "libjvm, the modules file"),
    Load("torch-cpu", ("python3", "/app/main.py"), "torch's libraries: most of the image"),
    Load("static-busybox", ("/bin/busybox", "sh", "/hello.sh"), "one static binary", added=None),
)  # fmt: skip


@dataclass(frozen=True)
class Link:
    """A setting of the shaper."""

    name: str
    first_byte_ms: float
    bytes_per_second: int


LINKS = {
    "far": Link("20 ms, 100 MB/s", 20, 100_000_000),
    "near": Link("5 ms, 1 GB/s", 5, 1_000_000_000),
}


@dataclass
class Run:
    """One start: seconds from nothing to the program's ready line, and what passed the shaper."""

    kind: str
    ready: float
    bytes: int = 0
    gets: int = 0
    parts: dict[str, float] = field(default_factory=dict)


@dataclass
class Bench:
    """The servers of one link, and where states of hosts lie."""

    stage: Stage
    link: Link
    objects: ObjectStore
    objects_proxy: Proxy
    registry: Registry
    registry_proxy: Proxy
    vm: bool
    folders: int = 0

    def settings(self, name: str, *, shaped: bool) -> Settings:
        """A host of its own; `shaped` reaches the store through the shaper."""
        url = self.objects.url(self.objects_proxy.endpoint if shaped else None)
        return load_settings(os.environ, state_dir=self.stage.folder / name, store=url)

    def fresh_folder(self) -> Path:
        """A path that nothing was mounted below before."""
        self.folders += 1
        return self.stage.folder / f"run-{self.folders}"

    def forget_host(self, name: str) -> None:
        """Removes a host's state."""
        shutil.rmtree(self.stage.folder / name, ignore_errors=True)


@contextlib.contextmanager
def daemon(bench: Bench, settings: Settings) -> Iterator[Process]:
    """A daemon on a host, ready when this enters."""
    command = [COMMAND, "--state-dir", str(settings.state_dir), "--store", settings.store_url]
    process = bench.stage.start([*command, "serve"], os.environ | store_environment())
    process.wait_until(lambda: b"ready:" in process.log.read_bytes())
    try:
        yield process
    finally:
        process.stop()


# --- programs


@contextlib.contextmanager
def writable(root: Path, folder: Path) -> Iterator[Path]:
    """A root over which a program may write, in memory, with /proc and /dev."""
    for name in ("upper", "merged"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder / "upper")], check=True)
    merged = folder / "merged"
    mounted = [folder / "upper"]
    try:
        (folder / "upper/u").mkdir()
        (folder / "upper/w").mkdir()
        options = f"lowerdir={root},upperdir={folder}/upper/u,workdir={folder}/upper/w"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "none", str(merged)], check=True)
        mounted.append(merged)
        for kind, name in (("proc", "proc"), ("devtmpfs", "dev"), ("tmpfs", "tmp")):
            (merged / name).mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", kind, "none", str(merged / name)], check=True)
            mounted.append(merged / name)
        yield merged
    finally:
        for path in reversed(mounted):
            unmount(path)


def unmount(path: Path) -> None:
    """Unmounts for good: a lazy one would leave a loop device that the next mount finds."""
    for _ in range(100):
        if not subprocess.run(["umount", str(path)], check=False, capture_output=True).returncode:
            return
        time.sleep(0.05)
    raise SystemExit(f"startup: {path} is busy")


def run_program(root: Path, load: Load, environment: Sequence[str]) -> float:
    """Runs the program in a chroot with a network of its own; the moment it said it is ready."""
    inside = ["env", "-i", *environment, "chroot", str(root), *load.command]
    command = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *inside]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    said = b""
    try:
        assert child.stdout is not None
        deadline = time.monotonic() + LONGEST_SECONDS
        for line in child.stdout:
            said += line
            if READY.encode() in line or (load.image == "openjdk" and b"build" in line):
                return time.monotonic()
            if time.monotonic() > deadline:
                break
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            child.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    raise SystemExit(f"startup: {load.image} was never ready:\n{said.decode()[-2000:]}")


def environment_of(recipe: Recipe) -> list[str]:
    """The image's variables."""
    return list(recipe.settings.environment)


# --- the kinds of starts


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
            environment = environment_of(RECIPES[load.image])
            ready = await asyncio.to_thread(run_program, root, load, environment)
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
        ready = run_program(root, load, environment_of(RECIPES[load.image]))
    parts = {"pull": pulled_at - begin, "unpack": unpacked - pulled_at, "program": ready - layered}
    return Run("pull", ready - begin - (layered - unpacked), *passed(counts), parts)


def cubecache(settings: Settings, *arguments: str) -> None:
    """A command that must succeed."""
    command = [COMMAND, "--state-dir", str(settings.state_dir), "--store", settings.store_url]
    subprocess.run(
        [*command, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | store_environment(),
    )


class Records:
    """The start records of a store, set aside and put back, to choose what is known."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._kept: dict[str, dict[str, bytes]] = {"unlearned": {}}

    async def keep(self, name: str) -> None:
        """Remembers what is known now under a name, and forgets it in the store."""
        async with opened_catalog(self._settings) as (opened, catalog):
            keys = [x.key async for x in opened.store.list(catalog.keys.prefix)]
            keys = [key for key in keys if "/starts/" in key]
            self._kept[name] = {key: await opened.store.get(key, limit=1 << 20) for key in keys}
            for key in keys:
                await opened.store.delete(key)

    async def use(self, name: str) -> None:
        """Lets the store know that, and nothing else."""
        await self.keep("")
        async with opened_catalog(self._settings) as (opened, _):
            for key, record in self._kept[name].items():
                await opened.store.put(key, record)


async def know_nothing(settings: Settings, reference: str) -> None:
    """Stores an empty profile, so that nothing is predicted in its place."""
    async with opened_catalog(settings) as (_, catalog):
        name = alias_name(parse_reference(reference))
        image = await catalog.resolve_name(name)
        async for root in catalog.roots():
            if root.image == image:
                empty = Profile(image, bytes.fromhex(root.block_image), 0, (), ())
                await Starts(catalog).save(name.repository, empty, None, root.generation)


async def learn(bench: Bench, load: Load, settings: Settings, reference: str) -> None:
    """One recorded start, unshaped."""
    with daemon(bench, settings):
        async with connect(settings, start=False) as client:
            handle = await client.export(reference, record=True)
            # The mount's own export would not be recorded: this one's socket is mounted by hand.
            await asyncio.to_thread(mount_and_run, bench, load, handle.uri)
            await client.stop_recording(handle.name)


def mount_and_run(bench: Bench, load: Load, uri: str) -> None:
    """The program over an export that exists already."""
    folder = bench.fresh_folder()
    (folder / "fuse").mkdir(parents=True)
    (folder / "root").mkdir()
    disk = folder / "fuse/disk"
    fuse = subprocess.Popen(["nbdfuse", "-r", str(disk), uri])
    try:
        while not disk.exists():
            time.sleep(0.02)
        mount = ["mount", "-t", "erofs", "-o", "ro,loop", str(disk), str(folder / "root")]
        subprocess.run(mount, check=True)
        try:
            with writable(folder / "root", folder / "over") as root:
                run_program(root, load, environment_of(RECIPES[load.image]))
        finally:
            unmount(folder / "root")
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(folder / "fuse")], check=False)
        fuse.wait()


def versions(load: Load, cache: Path, kinds: Sequence[str]) -> tuple[Path, Path | None]:
    """The layout that is measured, and that of the version before where it is asked for."""
    recipe = RECIPES[load.image]
    if "previous" not in kinds:
        return make(recipe, cache), None
    if load.previous is not None:
        return make(RECIPES[f"{load.image}-v2"], cache), make(recipe, cache)
    if load.added is None:
        return make(recipe, cache), None
    last = max(n for n, layer in enumerate(recipe.layers) if isinstance(layer, Packages))
    layer = recipe.layers[last]
    assert isinstance(layer, Packages)
    more = replace(layer, names=(*layer.names, load.added))
    layers = (*recipe.layers[:last], more, *recipe.layers[last + 1 :])
    newer = replace(recipe, name=f"{recipe.name}-next", layers=layers)
    return make(newer, cache), make(recipe, cache)


async def measure(bench: Bench, load: Load, rounds: int, kinds: Sequence[str]) -> dict[str, Any]:
    """All kinds of one image on one link."""
    now, before = versions(load, ROOT / ".cache/images", kinds)
    name = f"{load.image}:2"
    push(now, TAG, f"{bench.registry.address}/{name}")
    reference = f"{bench.registry.address}/{name}"
    builder = bench.settings("builder", shaped=False)
    records = Records(builder)
    cubecache(builder, "preload", reference)
    await records.keep("predicted")
    await learn(bench, load, bench.settings("learner", shaped=False), reference)
    bench.forget_host("learner")
    await records.keep("profile")
    if before is not None:
        push(before, TAG, f"{bench.registry.address}/{load.image}:1")
        older = f"{bench.registry.address}/{load.image}:1"
        cubecache(builder, "preload", older)
        await learn(bench, load, bench.settings("learner", shaped=False), older)
        bench.forget_host("learner")
        cubecache(builder, "preload", reference)
        await records.keep("previous")
    else:
        kinds = [kind for kind in kinds if kind != "previous"]
    await know_nothing(builder, reference)
    await records.keep("fill")
    runs: list[Run] = []
    for _ in range(rounds):
        if "pull" in kinds and not bench.vm:
            runs.append(await asyncio.to_thread(pulled, bench, load, name))
        for kind in kinds:
            if kind in ("pull", "warm"):
                continue
            await records.use(kind)
            settings = bench.settings("host", shaped=True)
            with daemon(bench, settings):
                runs.append(await lazily(bench, settings, load, reference, kind))
                if kind == "profile":
                    await filled(settings, reference)
                    runs.append(await lazily(bench, settings, load, reference, "warm"))
            bench.forget_host("host")
    rows = summary(runs)
    return {
        "image": load.image,
        "reads": load.reads,
        "link": bench.link.name,
        "vm": bench.vm,
        "rows": rows,
        "runs": [asdict(run) for run in runs],
    }


async def filled(settings: Settings, reference: str) -> None:
    """Returns when the host has all of the image, so that a warm start has the link to itself."""
    async with connect(settings, start=False) as client:
        handle = await client.export(reference)
        fields = handle.fields
        while fields["fill"]["state"] in ("idle", "running", "waiting"):
            await asyncio.sleep(0.1)
            (fields,) = [x for x in await client.exports() if x["name"] == handle.name]
        await client.unexport(handle.name, force=True)


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Medians by kind, with the added delay over warm."""
    rows: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        mine = [run for run in runs if run.kind == kind]
        if mine:
            rows[kind] = {
                "ready": statistics.median(run.ready for run in mine),
                "bytes": statistics.median(run.bytes for run in mine),
                "gets": statistics.median(run.gets for run in mine),
            }
    for row in rows.values():
        row["added"] = row["ready"] - rows["warm"]["ready"]
    return rows


def show(found: dict[str, Any]) -> None:
    """One table."""
    where = "microVM" if found["vm"] else "chroot on the lazy mount"
    print(f"\n{found['image']} ({found['reads']}), {found['link']}, {where}")
    print("| start | ready s | added s | of pull | fetched MB | GETs |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    pull = found["rows"].get("pull", {}).get("added")
    for kind, row in found["rows"].items():
        share = f"{row['added'] / pull:.2f}" if pull else "-"
        print(
            f"| {kind} | {row['ready']:.2f} | {row['added']:.2f} | {share} "
            f"| {row['bytes'] / 1e6:.1f} | {row['gets']:.0f} |",
            flush=True,
        )


async def on_link(chosen: argparse.Namespace, link: Link, images: Sequence[str]) -> list[Any]:
    """All images behind one setting of the shaper."""
    found = []
    for load in LOADS:
        if load.image not in images:
            continue
        with Stage() as stage:
            objects, registry = start_object_store(stage), start_registry(stage)
            shape = {
                "first_byte_ms": link.first_byte_ms,
                "bytes_per_second": link.bytes_per_second,
            }
            bench = Bench(
                stage,
                link,
                objects,
                start_proxy(stage, objects.endpoint, **shape),
                registry,
                start_proxy(stage, f"http://{registry.address}", **shape),
                chosen.vm,
            )
            found.append(await measure(bench, load, chosen.rounds, chosen.kinds))
            show(found[-1])
    return found


def main() -> int:
    """Measures; prints tables and writes JSON."""
    parser = argparse.ArgumentParser(description="Time to ready of real programs.")
    names = [load.image for load in LOADS]
    parser.add_argument("--image", action="append", choices=names, help="default: all")
    parser.add_argument("--link", action="append", choices=sorted(LINKS), help="default: both")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vm", action="store_true", help="in microVMs")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/startup.json")
    chosen = parser.parse_args()
    os.environ.update(store_environment())
    about = {"machine": machine(), "commit": commit(), "load_before": os.getloadavg()[0]}
    print(f"commit {about['commit']}; {about['machine']}; load {about['load_before']:.1f}")
    found: list[Any] = []
    for link in chosen.link or sorted(LINKS):
        found += asyncio.run(on_link(chosen, LINKS[link], chosen.image or names))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
    print(f"written to {chosen.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
