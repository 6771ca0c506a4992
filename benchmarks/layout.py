"""Cutting rules compared on real images: what is stored, shared between versions, and fetched.

Every candidate converts the same images on the path that builds use (the fixed grid alone is cut
from finished regions). A start-up is replayed from benchmarks/data: reads in order, each fetching
the chunks that are not there yet, neighbours of a pack in one GET. `--versions N` follows one image
over N versions instead, by the format's rule."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from appversions import Application
from cutting import (
    Convert,
    CutImage,
    LayerBlob,
    Workplace,
    convert_by,
    cut_image,
    layout_layers,
)
from fixedgrid import convert_by_grid
from imagemaker.make import make
from imagemaker.recipes import RECIPES
from testbed.machine import ROOT, commit, machine
from versions import follow_versions

from imagecache.blockimage import extents, locations
from imagecache.cache.plan import plan_gets
from imagecache.chunks import BLOCK
from imagecache.chunks.cut import FORMAT_CUT_RULE, CutRule

CACHE = ROOT / ".cache/images"
MAX_GET = 4 << 20


def by_path(path: bytes, content: bytes) -> int:  # noqa: ARG001 - the shape of all dice
    """A dice of the whole path."""
    return xxhash.xxh3_64_intdigest(path)


def by_content(path: bytes, content: bytes) -> int:  # noqa: ARG001 - the shape of all dice
    """A dice of the file's content."""
    return xxhash.xxh3_64_intdigest(content)


def never(path: bytes, content: bytes) -> int:  # noqa: ARG001 - the shape of all dice
    """Groups end at their bound alone."""
    return 1 << 62


def rule(blocks: int, least: int | None = None, **others: Any) -> CutRule:
    """A rule with one target, in blocks, for windows and groups."""
    return CutRule(blocks, blocks, blocks // 2 if least is None else least, **others)


def lift_caps() -> None:
    """Lets chunks above the format's cap pass its checks, in this process: one candidate has them.

    No other result depends on the caps.
    """
    extents.MAX_CHUNK_BLOCKS = locations.MAX_CHUNK_BYTES = 1 << 24  # type: ignore[attr-defined] # imported names


def candidates() -> dict[str, Convert]:
    """What is compared, by name."""
    rules = {
        "rule, 64 KiB": rule(16),
        "rule, 128 KiB": rule(32),
        "rule, 256 KiB (the format's)": FORMAT_CUT_RULE,
        "rule, 512 KiB": rule(128),
        "groups to 128 KiB, windows of 256": CutRule(64, 32, 16),
        "groups to 64 KiB, windows of 256": CutRule(64, 16, 8),
        "least group 32 KiB": rule(64, 8),
        "least group 64 KiB": rule(64, 16),
        "least group 192 KiB": rule(64, 48),
        "dice: path": rule(64, dice=by_path),
        "dice: content": rule(64, dice=by_content),
        "no dice, bound alone": rule(64, 63, dice=never),
        "tails grouped": rule(64, groups_tails=True),
        "a chunk per file": CutRule(64, 64, 0, dice=lambda _path, _content: 0),
    }
    return {
        "fixed 256 KiB of the region": convert_by_grid(64),
        **{name: convert_by(each) for name, each in rules.items()},
    }


@dataclass(frozen=True)
class Row:
    """One candidate; sizes in bytes, shares against the first version's stored bytes."""

    name: str
    chunks: int
    stored: int
    index: int
    rebuilt: float
    rebuilt_chunks: int
    order: float
    package: float  # stored again, as a multiple of the changed files compressed alone
    scattered: float
    compiled: float
    startup_gets: int
    startup_fetched: float  # stored bytes fetched, as a multiple of the bytes that it read
    others: int  # stored bytes of the other images


def layers_of(recipe: str) -> list[LayerBlob]:
    """The layers of a recipe's image."""
    return layout_layers(make(RECIPES[recipe], CACHE))


def startup(image: CutImage, reads: Sequence[tuple[str, int, int]]) -> tuple[int, int]:
    """(GETs, stored bytes) that the reads fetch on an empty host without any read-ahead."""
    view = image.view()
    disk = image.manifest.extents
    offsets: dict[str, int] = {"": 0}
    present: set[int] = set()
    gets = fetched = 0
    for path, offset, length in reads:
        if path not in offsets:
            raw = path.encode(errors="surrogateescape")
            offsets[path] = view.span(*view.resolve(raw)).offset
        start = offsets[path] + offset
        touched = disk.overlapping(start // BLOCK, -(-(start + length) // BLOCK))
        ordinals = dict.fromkeys(disk.ordinals[x] for x in touched)
        missing = [n for n in ordinals if n not in present]
        present.update(missing)
        for get in plan_gets(
            [image.table.locate(n) for n in missing], max_bytes=MAX_GET, max_gap=0
        ):
            gets += 1
            fetched += get.length
    return gets, fetched


class Sweep:
    """The images that every candidate cuts, made once."""

    def __init__(self, scratch: Path, others: Sequence[str]) -> None:
        self._scratch = scratch
        self.first = layers_of("python-numpy")
        self.rebuilt = layers_of("python-numpy-v2")
        self.one_order = layers_of("python-numpy-then-yaml")
        self.other_order = layers_of("python-yaml-then-numpy")
        self.others = [layers_of(name) for name in others]
        self.application = Application(self.first[1].path, scratch)
        recorded = ROOT / "benchmarks/data/startup-python-numpy.json"
        self.reads = json.loads(recorded.read_text())["reads"]

    def row(self, name: str, convert: Convert) -> Row:
        """Cuts everything by one candidate."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            place = Workplace(Path(folder))

            def cut(layers: Sequence[LayerBlob], over: CutImage | None = None) -> CutImage:
                known = over.locations() if over else {}
                done = {made.decoded.diff_id: made for made in over.layers} if over else {}
                return cut_image(layers, convert, place, known=known, done=done)

            first = cut(self.first)
            rebuilt = cut(self.rebuilt, first)
            one_order = cut(self.one_order)
            other_order = cut(self.other_order, one_order)
            application = cut([self.application.first])
            package, scattered, compiled = (
                cut([version.layer], application).stored_bytes / version.changed_bytes
                for version in (
                    self.application.package,
                    self.application.scattered,
                    self.application.compiled,
                )
            )
            gets, fetched = startup(first, self.reads)
            return Row(
                name=name,
                chunks=len(first.manifest.chunks),
                stored=first.stored_bytes,
                index=first.index_bytes,
                rebuilt=rebuilt.stored_bytes / first.stored_bytes,
                rebuilt_chunks=rebuilt.new_chunks,
                order=other_order.stored_bytes / one_order.stored_bytes,
                package=package,
                scattered=scattered,
                compiled=compiled,
                startup_gets=gets,
                startup_fetched=fetched / sum(length for _, _, length in self.reads),
                others=sum(cut(layers).stored_bytes for layers in self.others),
            )


HEAD = """| rule | chunks | stored MB | rebuilt | its chunks | other order | app: package \
| app: scattered | app: compiled | start-up GETs | fetched/read | index KB | others MB |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def table_row(row: Row) -> str:
    """One row of the table."""
    cells = [
        row.name,
        f"{row.chunks:,}",
        f"{row.stored / 1e6:.2f}",
        f"{row.rebuilt:.2%}",
        f"{row.rebuilt_chunks}",
        f"{row.order:.2%}",
        f"{row.package:.2f}",
        f"{row.scattered:.2f}",
        f"{row.compiled:.2f}",
        f"{row.startup_gets}",
        f"{row.startup_fetched:.2f}",
        f"{row.index / 1e3:.0f}",
        f"{row.others / 1e6:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def show_versions(count: int) -> list[dict[str, Any]]:
    """Follows one image over versions; prints and returns the rows."""
    base, package = layers_of("python-numpy")[:2]
    rows = []
    print("| version | stored MB | new chunks | packs | GETs | alone: stored MB | alone: GETs |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="cubecache-versions-") as folder:
        for row in follow_versions(base, package, count, Path(folder)):
            rows.append(asdict(row))
            print(
                f"| {row.number} | {row.stored / 1e6:.2f} | {row.new_chunks} | {row.packs} "
                f"| {row.gets} | {row.whole_stored / 1e6:.2f} | {row.whole_gets} |",
                flush=True,
            )
    return rows


def main() -> None:
    """Runs the sweep, or follows versions."""
    parser = argparse.ArgumentParser(description="Compare cutting rules on real images.")
    parser.add_argument("--others", nargs="*", default=["nginx"], choices=sorted(RECIPES))
    parser.add_argument("--only", help="only candidates whose name holds this text")
    parser.add_argument("--versions", type=int, metavar="N", help="follow N versions instead")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/layout.json")
    chosen = parser.parse_args()
    about = {
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    print(f"commit {about['commit']}; {about['machine']}")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    if chosen.versions:
        written = {"about": about, "versions": show_versions(chosen.versions)}
        chosen.output.with_name("versions.json").write_text(json.dumps(written, indent=1) + "\n")
        return
    rows: list[Row] = []
    lift_caps()
    with tempfile.TemporaryDirectory(prefix="cubecache-layout-") as folder:
        sweep = Sweep(Path(folder), chosen.others)
        print(HEAD)
        for name, convert in candidates().items():
            if chosen.only is None or chosen.only in name:
                rows.append(sweep.row(name, convert))
                print(table_row(rows[-1]), flush=True)
    written = {"about": about, "rows": [asdict(row) for row in rows]}
    chosen.output.write_text(json.dumps(written, indent=1) + "\n")
    print(f"written to {chosen.output}")


if __name__ == "__main__":
    main()
