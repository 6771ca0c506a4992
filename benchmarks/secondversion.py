"""What the second version of an image costs: time and stored bytes, against the first.

Built by the pipeline into a file store, the first version, then the second: (a) its application
layer changed in different ways, (b) its package layer rebuilt with one package more, (c) the same
packages installed in another order. Stored bytes are what the store's directory grew by: packs,
indexes, tables and records. A start's boot pack, which `preload` adds, is not part of them.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appversions import Application
from cutting import LayerBlob, layout_layers
from imagemaker.make import make
from imagemaker.recipes import RECIPES
from testbed.machine import ROOT, commit, machine

from imagecache.build.progress import BuildResult
from imagecache.catalog import AliasName
from imagecache.chunks import MAX_CHUNK_BYTES
from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.settings import Settings

CACHE = ROOT / ".cache/images"


@dataclass(frozen=True)
class Case:
    """Two versions of an image, by reference; `changed_bytes` are compressed, 0: not counted."""

    name: str
    first: str
    second: str
    changed_bytes: int = 0


@dataclass(frozen=True)
class Row:
    """One case; bytes are of the store, seconds of a build (medians)."""

    name: str
    first_bytes: int
    second_bytes: int
    first_chunks: int
    chunks_per_file: int  # that one chunk per file, and its windows, would make of the first
    new_chunks: int
    new_objects: int
    changed_bytes: int
    first_seconds: float
    second_seconds: float


def layout_with(base: list[LayerBlob], layer: LayerBlob, folder: Path) -> str:
    """An OCI layout of `base` and one more layer, whose blobs are links; its reference."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def add(body: bytes) -> dict[str, Any]:
        name = hashlib.sha256(body).hexdigest()
        (blobs / name).write_bytes(body)
        return {"digest": f"sha256:{name}", "size": len(body)}

    kind = "application/vnd.oci.image."
    layers = [*base, layer]
    config = {
        "architecture": json.loads(host_config(base[0]))["architecture"],
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [each.diff_id for each in layers]},
    }
    descriptors = []
    for each in layers:
        (blobs / each.path.name).hardlink_to(each.path)
        size = each.path.stat().st_size
        described = {"digest": f"sha256:{each.path.name}", "size": size}
        descriptors.append({"mediaType": kind + "layer.v1.tar", **described})
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind + "manifest.v1+json",
        "config": {"mediaType": kind + "config.v1+json", **add(json.dumps(config).encode())},
        "layers": descriptors,
    }
    named = {
        "mediaType": kind + "manifest.v1+json",
        **add(json.dumps(manifest).encode()),
        "annotations": {"org.opencontainers.image.ref.name": "latest"},
    }
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return f"oci:{folder}:latest"


def host_config(layer: LayerBlob) -> bytes:
    """The config of the layout that a layer's blob is in."""
    layout = layer.path.parents[2]
    index = json.loads((layout / "index.json").read_bytes())
    manifest = layout / "blobs" / index["manifests"][0]["digest"].replace(":", "/")
    config: str = json.loads(manifest.read_bytes())["config"]["digest"]
    return (layout / "blobs" / config.replace(":", "/")).read_bytes()


def cases(folder: Path) -> Iterator[Case]:
    """All cases; application versions are made in the folder."""

    def recipe(name: str) -> str:
        return f"oci:{make(RECIPES[name], CACHE)}:latest"

    base = layout_layers(make(RECIPES["python-numpy"], CACHE))[:2]
    application = Application(base[1].path, folder)
    first = layout_with(base, application.first, folder / "app-first")
    for name, version in (
        ("(a) 10 sources changed, here and there", application.scattered),
        ("(a) the sources of one package changed", application.package),
        ("(a) all sources changed", application.sources),
        ("(a) all shared objects changed", application.compiled),
        ("(a) two packages of ten upgraded", application.upgraded),
    ):
        second = layout_with(base, version.layer, folder / f"app-{version.changed_bytes}")
        yield Case(name, first, second, version.changed_bytes)
    yield Case("(b) one package more", recipe("python-numpy"), recipe("python-numpy-v2"))
    orders = recipe("python-numpy-then-yaml"), recipe("python-yaml-then-numpy")
    yield Case("(c) packages in another order", *orders)


def chunks_per_file(reference: str) -> int:
    """Chunks of an image if each file began one."""
    count = 0
    for layer in layout_layers(Path(reference.split(":")[1])):
        with layer.path.open("rb") as blob:
            packed = blob.read(2) == b"\x1f\x8b"
            blob.seek(0)
            with tarfile.open(fileobj=blob, mode="r|gz" if packed else "r|") as tar:
                count += sum(-(-item.size // MAX_CHUNK_BYTES) for item in tar if item.isreg())
    return count


def contents(store: Path) -> dict[Path, int]:
    """Every object with its bytes."""
    return {path: path.stat().st_size for path in store.rglob("*") if path.is_file()}


async def build(settings: Settings, reference: str, name: str) -> BuildResult:
    """Builds one version under a name of the same repository."""
    async with opened_catalog(settings) as (_, catalog):
        request = ImageRequest.parse(reference, None, "erofs")
        alias = AliasName("bench/image", name, f"bench/image:{name}")
        return await build_image(settings, catalog, request, lambda _: None, alias=alias)


def run(case: Case, rounds: int, scratch: Path) -> Row:
    """Builds both versions of a case, some times; times are medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            store = Path(folder, "store")
            settings = Settings(state_dir=Path(folder, "state"), store_url=store.as_uri())
            first = asyncio.run(build(settings, case.first, "v1"))
            before = contents(store)
            second = asyncio.run(build(settings, case.second, "v2"))
            after = contents(store)
            times[0].append(first.seconds)
            times[1].append(second.seconds)
    new = after.keys() - before.keys()
    return Row(
        name=case.name,
        first_bytes=sum(before.values()),
        second_bytes=sum(after[path] for path in new),
        first_chunks=first.chunks,
        chunks_per_file=chunks_per_file(case.first),
        new_chunks=second.new_chunks,
        new_objects=len(new),
        changed_bytes=case.changed_bytes,
        first_seconds=statistics.median(times[0]),
        second_seconds=statistics.median(times[1]),
    )


HEAD = """| second version | KB changed | KB stored | / changed | of the first | new chunks \
| new objects | seconds | first: seconds | its MB | its chunks | a chunk per file |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def table_row(row: Row) -> str:
    """One row of the table."""
    changed = row.changed_bytes
    cells = [
        row.name,
        f"{changed / 1e3:.0f}" if changed else "",
        f"{row.second_bytes / 1e3:.0f}",
        f"{row.second_bytes / changed:.2f}" if changed else "",
        f"{row.second_bytes / row.first_bytes:.2%}",
        f"{row.new_chunks}",
        f"{row.new_objects}",
        f"{row.second_seconds:.2f}",
        f"{row.first_seconds:.2f}",
        f"{row.first_bytes / 1e6:.1f}",
        f"{row.first_chunks:,}",
        f"{row.chunks_per_file:,}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description="The cost of an image's second version.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/secondversion.json")
    chosen = parser.parse_args()
    about = {
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    print(f"commit {about['commit']}; {about['machine']}; load {about['load_before']:.1f}")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=chosen.output.parent) as folder:
        print(HEAD)
        for case in cases(Path(folder)):
            rows.append(run(case, chosen.rounds, Path(folder)))
            print(table_row(rows[-1]), flush=True)
    written = {"about": about, "rows": [asdict(row) for row in rows]}
    chosen.output.write_text(json.dumps(written, indent=1) + "\n")
    print(f"written to {chosen.output}")


if __name__ == "__main__":
    main()
