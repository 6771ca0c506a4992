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
program in a microVM (`cubecache run`), else in a chroot over the lazy mount. The read set is what
the recorded start read, files and metadata. It runs in pieces: `--image`, `--link`, `--kinds`,
`--rounds` and `--output` choose one, and `--plot a.json b.json` draws what several have written.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from imagemaker.layout import push
from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES, Packages
from largeimage import large_layout
from shaped import LINKS, Link
from starthosts import Bench, Records, cubecache, daemon, filled, know_nothing, learn, read_set
from startloads import LARGE, LOADS, Load
from startplots import write_page
from startruns import Run, lazily, pulled
from testbed.machine import ROOT, commit, machine
from testbed.processes import Stage
from testbed.servers import start_object_store, start_proxy, start_registry, store_environment

KINDS = ("pull", "fill", "unlearned", "predicted", "profile", "previous", "warm")


def versions(load: Load, cache: Path, kinds: Sequence[str]) -> tuple[Path, Path | None]:
    """The layout that is measured, and that of the version before where it is asked for."""
    if load.image == LARGE:
        return large_layout(cache), None
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
    read_bytes = await asyncio.to_thread(read_set, builder, reference)
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
        "read_bytes": read_bytes,
        "link": bench.link.name,
        "vm": bench.vm,
        "rows": rows,
        "runs": [asdict(run) for run in runs],
    }


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
    print(f"recorded read set: {found['read_bytes'] / 1e6:.1f} MB")
    print("| start | ready s | added s | of pull | fetched MB | fetched of read | GETs |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    pull = found["rows"].get("pull", {}).get("added")
    for kind, row in found["rows"].items():
        share = f"{row['added'] / pull:.2f}" if pull else "-"
        print(
            f"| {kind} | {row['ready']:.2f} | {row['added']:.2f} | {share} "
            f"| {row['bytes'] / 1e6:.1f} | {row['bytes'] / max(1, found['read_bytes']):.2f} "
            f"| {row['gets']:.0f} |",
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
    parser.add_argument(
        "--image", action="append", choices=names, help="default: all but the large one"
    )
    parser.add_argument("--large", action="store_true", help="the 25 GB image too; by hand only")
    parser.add_argument("--plot", type=Path, nargs="+", metavar="JSON", help="draw these alone")
    parser.add_argument("--link", action="append", choices=sorted(LINKS), help="default: both")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vm", action="store_true", help="in microVMs")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/startup.json")
    chosen = parser.parse_args()
    if chosen.plot:
        write_page(chosen.plot, chosen.output.with_suffix(".html"))
        return 0
    images = chosen.image or [name for name in names if name != LARGE or chosen.large]
    os.environ.update(store_environment())
    about = {"machine": machine(), "commit": commit(), "load_before": os.getloadavg()[0]}
    print(f"commit {about['commit']}; {about['machine']}; load {about['load_before']:.1f}")
    found: list[Any] = []
    for link in chosen.link or sorted(LINKS):
        found += asyncio.run(on_link(chosen, LINKS[link], images))
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
    page = chosen.output.with_suffix(".html")
    write_page([chosen.output], page)
    print(f"written to {chosen.output} and {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
