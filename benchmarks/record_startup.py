"""Records what a start-up reads from the disk of a block image, as (path, offset, length).

The image's disk is written out once, attached as a loop device (direct I/O, so that nothing but
the file system's own read-ahead shapes the requests) and mounted; the kernel's block trace tells
every request that the device gets. Needs root, tracefs and loop devices. Writes benchmarks/data/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cutting import CutImage, Workplace, convert_by, cut_image, layout_layers, write_pieces
from imagemaker.make import make
from imagemaker.recipes import RECIPES
from testbed.machine import ROOT, commit, machine
from testbed.processes import Stage

TRACING = Path("/sys/kernel/tracing")
SECTOR = 512
_ISSUED = re.compile(r"block_rq_issue: (\d+),(\d+) R\S* \d+ \([^)]*\) (\d+) \+ (\d+)")


def run(*command: str) -> str:
    """Runs a program that must succeed; its stdout."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def traced(found: list[tuple[int, int, int]]) -> Iterator[None]:
    """Appends (minor, sector, sectors) of loop devices' reads while it is entered."""
    mounted = False
    if not (TRACING / "instances").exists():
        run("mount", "-t", "tracefs", "none", str(TRACING))
        mounted = True
    instance = TRACING / "instances/cubecache-record"
    instance.mkdir()
    try:
        (instance / "buffer_size_kb").write_text("16384")
        issued = instance / "events/block/block_rq_issue"
        (issued / "filter").write_text("dev >= 7340032 && dev < 8388608")  # major 7 << 20
        (issued / "enable").write_text("1")
        yield
        (issued / "enable").write_text("0")
        for line in (instance / "trace").read_text().splitlines():
            if match := _ISSUED.search(line):
                found.append((int(match[2]), int(match[3]), int(match[4])))
    finally:
        instance.rmdir()
        if mounted:
            run("umount", str(TRACING))


def start_up(disk: Path, folder: Path, program: Sequence[str]) -> list[tuple[int, int]]:
    """(offset, length) of every read that mounting the disk and running the program makes."""
    folder.mkdir()
    device = run("losetup", "--find", "--show", "--read-only", "--direct-io=on", str(disk))
    found: list[tuple[int, int, int]] = []
    try:
        with traced(found):
            run("mount", "-t", "erofs", "-o", "ro", device, str(folder))
            try:
                run("chroot", str(folder), *program)
            finally:
                run("umount", str(folder))
    finally:
        run("losetup", "--detach", device)
    minor = int(device.removeprefix("/dev/loop"))
    return [(at * SECTOR, count * SECTOR) for number, at, count in found if number == minor]


def by_path(image: CutImage, reads: Sequence[tuple[int, int]]) -> list[tuple[str, int, int]]:
    """Reads named by file; metadata reads keep their disk offset, under the empty path."""
    view = image.view()
    named = []
    for offset, length in reads:
        at = view.path_at(offset)
        path, inside = (b"", offset) if at is None else at
        named.append((path.decode(errors="surrogateescape"), inside, length))
    return named


def main() -> None:
    """Records one start-up."""
    parser = argparse.ArgumentParser(description="Record what a start-up reads.")
    parser.add_argument("--image", default="python-numpy", choices=sorted(RECIPES))
    parser.add_argument("program", nargs="*", default=["/usr/bin/python3", "-c", "import numpy"])
    chosen = parser.parse_args()
    with Stage() as stage:
        layers = layout_layers(make(RECIPES[chosen.image], ROOT / ".cache/images"))
        place = Workplace(stage.folder / "work", keep=True)
        image = cut_image(layers, convert_by(), place)
        disk = stage.folder / "disk"
        sizes = image.manifest.chunks.sizes
        write_pieces(
            image.manifest.chunks,
            image.manifest.pieces,
            lambda n: place.read(image.table.locate(n), sizes[n]),
            disk,
        )
        reads = start_up(disk, stage.folder / "mounted", chosen.program)
        named = by_path(image, reads)
    about = {
        "image": chosen.image,
        "program": chosen.program,
        "how": "block_rq_issue of a loop device with direct I/O under an EROFS mount",
        "layers": [layer.diff_id for layer in layers],
        "reads": len(named),
        "bytes": sum(length for _, _, length in named),
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    target = ROOT / "benchmarks/data" / f"startup-{chosen.image}.json"
    rows = ",\n".join(json.dumps(row) for row in named)
    target.write_text(
        json.dumps({"about": about}, indent=1)[:-2] + f',\n "reads": [\n{rows}\n]}}\n'
    )
    print(f"{len(named)} reads, {about['bytes']:,} bytes, written to {target}")


if __name__ == "__main__":
    main()
