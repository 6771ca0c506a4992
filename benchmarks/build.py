"""Building a block image from a registry on loopback, beside the ways that need no cubecache.

Ours goes into an empty file store: it verifies, hashes, compresses and stores durably. The others
end with one local EROFS file: (a) skopeo copy, tar x of each layer, mkfs.erofs; (b) skopeo copy,
umoci unpack, mkfs.erofs. All take the same image from the same registry, in turn, round by round;
medians are compared. The unavoidable stages are measured alone, in the same run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blake3 import blake3
from cutting import LayerBlob, layout_layers
from imagemaker.layout import LayerSource, Settings, push, write_layout
from imagemaker.make import make
from imagemaker.recipes import RECIPES
from processtree import Cost, measured
from testbed.machine import ROOT, commit, machine, version
from testbed.processes import Stage
from testbed.servers import start_registry

from imagecache.chunks import MAX_CHUNK_BYTES
from imagecache.chunks.codec import DEFAULT_LEVEL, ChunkEncoder
from imagecache.flatten.decompress import open_layer
from imagecache.flatten.limits import Limits

CACHE = ROOT / ".cache/images"
COMMAND = str(ROOT / ".venv/bin/cubecache")
OURS = "cubecache"


def gzip_layout(name: str) -> Path:
    """A recipe's image with every layer compressed by gzip, as most registries have them."""
    source = make(RECIPES[name], CACHE)
    target = ROOT / ".cache/bench" / f"{source.name}-gzip"
    if (target / "index.json").exists():
        return target
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        layers = []
        for number, layer in enumerate(layout_layers(source)):
            tar = Path(folder) / f"{number}.tar"
            with layer.path.open("rb") as blob, tar.open("wb") as plain:
                stream = open_layer(blob, Limits())
                while piece := stream.piece():
                    plain.write(piece)
            layers.append(LayerSource(tar, "gzip", "gzip"))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_layout(target, "latest", layers, Settings(), epoch=0)
    return target


class Contest:
    """The three ways, each from the registry into a fresh folder."""

    def __init__(self, stage: Stage, layout: Path, address: str) -> None:
        self._folder = stage.folder
        self._image = f"{address}/bench/image:v1"
        self._blobs = [f"{layer.path.name}" for layer in layout_layers(layout)]

    def ours(self, folder: Path) -> tuple[Cost, str]:
        """`cubecache preload` into an empty file store."""
        command = [COMMAND, "--state-dir", str(folder / "state")]
        command += ["--store", (folder / "store").as_uri(), "preload", self._image, "--json"]
        return measured([command])

    def _copy(self, target: str) -> list[str]:
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]
        return [*command, f"docker://{self._image}", target]

    def by_tar(self, folder: Path) -> tuple[Cost, str]:
        """Each layer unpacked over the last (without whiteouts), then made into EROFS."""
        root = folder / "root"
        root.mkdir()
        commands = [self._copy(f"dir:{folder / 'image'}")]
        for name in self._blobs:
            commands.append(
                [
                    "tar",
                    "-x",
                    "-z",
                    "-p",
                    "--xattrs",
                    "-C",
                    str(root),
                    "-f",
                    str(folder / "image" / name),
                ]
            )
        commands.append(["mkfs.erofs", str(folder / "image.erofs"), str(root)])
        return measured(commands)

    def by_umoci(self, folder: Path) -> tuple[Cost, str]:
        """umoci unpacks the layers, whiteouts and all."""
        bundle = str(folder / "bundle")
        unpack = ["umoci", "unpack", "--image", f"{folder / 'image'}:v1", bundle]
        return measured(
            [
                self._copy(f"oci:{folder / 'image'}:v1"),
                unpack,
                ["mkfs.erofs", str(folder / "image.erofs"), f"{bundle}/rootfs"],
            ]
        )

    def round(self, way: Callable[[Path], tuple[Cost, str]]) -> tuple[Cost, str]:
        """One run of one way, with what earlier runs wrote on the disk already."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        os.sync()
        try:
            return way(folder)
        finally:
            shutil.rmtree(folder)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the fastest of three runs."""
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return min(found)


def stages(layers: list[LayerBlob], address: str) -> dict[str, float]:
    """Seconds of each stage that no builder of ours can leave out, alone and without Python."""
    plain: list[bytes] = []

    def inflate() -> None:
        plain.clear()
        for layer in layers:
            with layer.path.open("rb") as blob:
                stream = open_layer(blob, Limits())
                while piece := stream.piece():
                    plain.append(piece)

    def download() -> None:
        for layer in layers:
            url = f"http://{address}/v2/bench/image/blobs/sha256:{layer.path.name}"
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(url, timeout=60) as answer:
                while answer.read(1 << 20):
                    pass

    def hash_plain() -> None:
        digest = hashlib.sha256()
        for piece in plain:
            digest.update(piece)

    def hash_blobs() -> None:
        for layer in layers:
            hashlib.sha256(layer.path.read_bytes())

    def encode(pieces: list[bytes]) -> None:
        encoder = ChunkEncoder(DEFAULT_LEVEL)
        for piece in pieces:
            for at in range(0, len(piece), MAX_CHUNK_BYTES):
                chunk = piece[at : at + MAX_CHUNK_BYTES]
                blake3(chunk)
                encoder.encode(chunk)

    def encode_on_all_cores() -> None:
        cores = os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(encode, [plain[n::cores] for n in range(cores)]))

    return {
        "download": timed(download),
        "SHA-256 of the blobs": timed(hash_blobs),
        "decompression": timed(inflate),
        "SHA-256 of the layers": timed(hash_plain),
        "BLAKE3 and zstd, all cores": timed(encode_on_all_cores),
    }


def summary(runs: list[Cost]) -> dict[str, Any]:
    """Medians of one way, and its runs."""
    return {
        "wall": statistics.median(run.wall for run in runs),
        "cpu": statistics.median(run.cpu for run in runs),
        "memory": max(run.memory for run in runs),
        "runs": [asdict(run) for run in runs],
    }


def erofs_version() -> str:
    """The version that mkfs.erofs prints."""
    answer = subprocess.run(["mkfs.erofs", "-V"], check=False, capture_output=True, text=True)
    return (answer.stdout or answer.stderr).splitlines()[0].strip()


def main() -> int:
    """Runs the contest; 1 where ours takes more than half the wall time of either other."""
    parser = argparse.ArgumentParser(description="Build a block image, ours and by hand.")
    parser.add_argument("--image", default="openjdk", choices=sorted(RECIPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/build.json")
    chosen = parser.parse_args()
    layout = gzip_layout(chosen.image)
    with Stage() as stage:
        registry = start_registry(stage)
        push(layout, "latest", f"{registry.address}/bench/image:v1")
        contest = Contest(stage, layout, registry.address)
        ways = {OURS: contest.ours, "tar + mkfs.erofs": contest.by_tar}
        ways["umoci + mkfs.erofs"] = contest.by_umoci
        if chosen.only_ours:
            ways = {OURS: contest.ours}
        about = {
            "machine": machine(),
            "load_before": os.getloadavg()[0],
            "commit": commit(),
            "versions": {
                "skopeo": version("skopeo", "--version"),
                "umoci": version("umoci", "--version"),
                "tar": version("tar", "--version"),
                "erofs-utils": erofs_version(),
                "registry": version("docker-registry", "--version"),
            },
            "image": chosen.image,
            "compressed_bytes": sum(x.path.stat().st_size for x in layout_layers(layout)),
            "rounds": chosen.rounds,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }
        print(f"commit {about['commit']}; {about['machine']}; load {about['load_before']:.1f}")
        print(
            f"{chosen.image}: {about['compressed_bytes'] / 1e6:.0f} MB compressed (gzip)",
            flush=True,
        )
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        said = ""
        for _ in range(chosen.rounds):
            for name, way in ways.items():
                cost, output = contest.round(way)
                costs[name].append(cost)
                said = output if name == OURS else said
        alone = stages(layout_layers(layout), registry.address)
    rows = {name: summary(runs) for name, runs in costs.items()}
    ours = rows[OURS]["wall"]
    print("| way | wall s | CPU s | peak MB | ours / it |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['wall']:.2f} | {row['cpu']:.2f} | {row['memory'] / 1e6:.0f} "
            f"| {ours / row['wall']:.2f} |"
        )
    print("| stage alone | s |\n|---|---|")
    for name, seconds in alone.items():
        print(f"| {name} | {seconds:.2f} |")
    limit = max(alone.values())
    print(f"share of the limit (the slowest stage alone): {limit / ours:.0%}")
    print(f"our stages, overlapping: {json.loads(said)['stages']}")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    written = {"about": about, "rows": rows, "alone": alone, "built": json.loads(said)}
    chosen.output.write_text(json.dumps(written, indent=1) + "\n")
    print(f"written to {chosen.output}")
    return int(any(ours > row["wall"] / 2 for name, row in rows.items() if name != OURS))


if __name__ == "__main__":
    sys.exit(main())
