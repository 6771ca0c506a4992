"""Images at the size limits, made on the fly: many files, or many bytes.

`--files N` makes one layer of N small files. `--large` makes a disk of 20 GB apparent size, a
quarter of it incompressible and the rest holes and text, in four layers; it needs some 25 GB free
beside the checkout and is for running by hand. Both build through `cubecache preload` into an
empty file store and print peak memory, times, and what the block manifest costs to attach.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import resource
import shutil
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from processtree import measured
from testbed.machine import ROOT, commit, machine

from imagecache.blockimage.envelope import seal
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.cache.image import ImageMap
from imagecache.composition import opened_catalog
from imagecache.settings import Settings

COMMAND = str(ROOT / ".venv/bin/cubecache")
PIECE = 1 << 20
FREE_BYTES = 25 << 30
LARGE_LAYERS = 4
NOISE_PER_LAYER = 5 * (1 << 30) // LARGE_LAYERS + (64 << 20)
TEXT_PER_LAYER = 1 << 30


class _Hashed:
    """A blob that is written and hashed at once."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "partial").open("wb")
        self._folder = folder
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def finish(self) -> dict[str, Any]:
        self._file.close()
        name = self._hash.hexdigest()
        (self._folder / "partial").rename(self._folder / name)
        return {"digest": f"sha256:{name}", "size": self.size}


class _Noise:
    """A file of random bytes that is never held as a whole."""

    def __init__(self, seed: int, size: int) -> None:
        self._dice = random.Random(seed)
        self._left = size

    def read(self, size: int) -> bytes:
        size = min(size, self._left)
        self._left -= size
        return self._dice.randbytes(size)


class _Text(_Noise):
    """Bytes that compress well: each piece repeats a random line."""

    def read(self, size: int) -> bytes:
        size = min(size, self._left)
        self._left -= size
        line = self._dice.randbytes(32).hex().encode() + b"\n"
        return (line * (size // len(line) + 1))[:size]


def many_files(tar: tarfile.TarFile, count: int) -> None:
    """`count` files of up to 6 KB in folders of a hundred."""
    dice = random.Random(1)
    body = dice.randbytes(8192)
    for number in range(count):
        if number % 100 == 0:
            folder = tarfile.TarInfo(f"data/{number // 10_000:03}/{number // 100:06}")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        member = tarfile.TarInfo(f"data/{number // 10_000:03}/{number // 100:06}/{number:08}.txt")
        member.size = dice.randrange(6000)
        member.mtime = number
        at = dice.randrange(2000)
        tar.addfile(member, BytesIO(body[at : at + member.size]))


def large_layer(tar: tarfile.TarFile, layer: int) -> None:
    """1.3 GiB of noise in files of 64 MiB, 1 GiB of text, and a sparse file for the rest."""
    for number in range(NOISE_PER_LAYER // (64 << 20)):
        member = tarfile.TarInfo(f"models/{layer}/weights-{number:03}.bin")
        member.size = 64 << 20
        tar.addfile(member, _reader(_Noise(layer << 16 | number, member.size)))
    for number in range(16):
        member = tarfile.TarInfo(f"models/{layer}/text-{number:03}.json")
        member.size = TEXT_PER_LAYER // 16
        tar.addfile(member, _reader(_Text(layer << 16 | number, member.size)))
    apparent = (20 << 30) // LARGE_LAYERS
    hole = apparent - NOISE_PER_LAYER - TEXT_PER_LAYER
    sparse_layer(tar, f"models/{layer}/sparse.img", hole, seed=layer)


def sparse_layer(tar: tarfile.TarFile, name: str, size: int, seed: int = 0) -> None:
    """One file: a piece of data at its start, then a hole to its end (PAX sparse form 0.1)."""
    member = tarfile.TarInfo(name)
    member.size = PIECE
    member.pax_headers = {"GNU.sparse.map": f"0,{PIECE}", "GNU.sparse.size": str(size)}
    tar.addfile(member, _reader(_Noise(seed, PIECE)))


def text_layer(tar: tarfile.TarFile, layer: int, size: int) -> None:
    """`size` bytes of text in files of 64 MiB: as many chunks as noise makes, at little disk."""
    for number in range(-(-size // (64 << 20))):
        member = tarfile.TarInfo(f"texts/{layer}/{number:04}.txt")
        member.size = min(64 << 20, size - number * (64 << 20))
        tar.addfile(member, _reader(_Text(layer << 24 | number, member.size)))


def noise_layer(tar: tarfile.TarFile, name: str, size: int) -> None:
    """One file of `size` bytes that do not compress."""
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, _reader(_Noise(6, size)))


def _reader(source: _Noise) -> IO[bytes]:
    return source  # type: ignore[return-value] # tarfile calls read alone


def write_layout(folder: Path, layers: list[Callable[[tarfile.TarFile], None]]) -> None:
    """An OCI layout of uncompressed layers, written once and hashed on the way."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def add(content: bytes) -> dict[str, Any]:
        blob = _Hashed(blobs)
        blob.write(content)
        return blob.finish()

    descriptors = []
    for layer in layers:
        blob = _Hashed(blobs)
        stream: Any = blob  # tarfile calls its write alone
        with tarfile.open(
            fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=PIECE
        ) as tar:
            layer(tar)
        descriptors.append(blob.finish())
    media = "application/vnd.oci.image."
    config = add(
        json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [x["digest"] for x in descriptors]},
            }
        ).encode()
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": media + "manifest.v1+json",
        "config": {"mediaType": media + "config.v1+json", **config},
        "layers": [{"mediaType": media + "layer.v1.tar", **x} for x in descriptors],
    }
    named = {"mediaType": manifest["mediaType"], **add(json.dumps(manifest).encode())}
    named["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def cost_of(image: Callable[[], object]) -> tuple[float, int]:
    """(fastest seconds of five, bytes that stay) of making an object; bytes are tracemalloc's."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        image()
        seconds.append(time.perf_counter() - begin)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = image()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    del kept
    return min(seconds), held


async def attached(state: Path, store: str) -> dict[str, Any]:
    """What the host pays to attach the store's one image, once its objects are on the host."""
    settings = Settings(state_dir=state, store_url=store)
    async with opened_catalog(settings) as (_, catalog):
        root = await anext(aiter(catalog.roots()))
        manifest = await catalog.block_manifest(root)
        table = await catalog.location_table(root)
    plain, places = manifest.encode(), table.encode()
    sealed = [len(seal(x)[1]) for x in (plain, places)]
    seconds, held = cost_of(
        lambda: ImageMap(
            BlockManifest.decode(plain), LocationTable.decode(places), lambda name: name.hex()
        )
    )
    return {
        "disk_bytes": manifest.size_bytes,
        "chunks": len(manifest.chunks),
        "manifest_bytes": len(plain),
        "sealed_manifest_bytes": sealed[0],
        "location_table_bytes": len(places),
        "sealed_location_table_bytes": sealed[1],
        "attach_seconds": seconds,
        "map_bytes": held,
    }


def largest_process() -> int:
    """Peak resident bytes of the largest process that has ended, page cache mappings included."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10


def main() -> None:
    """Builds one image and prints what it cost."""
    parser = argparse.ArgumentParser(description="Build images at the size limits.")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--files", type=int, metavar="N", help="one layer of N small files")
    group.add_argument("--large", action="store_true", help="20 GB; by hand only")
    parser.add_argument("--output", type=Path, default=ROOT / ".cache/bench/large.json")
    chosen = parser.parse_args()
    if chosen.large and shutil.disk_usage(tempfile.gettempdir()).free < FREE_BYTES:
        raise SystemExit(f"large: {tempfile.gettempdir()} needs {FREE_BYTES >> 30} GiB free")
    layers: list[Callable[[tarfile.TarFile], None]]
    if chosen.large:
        layers = [partial(large_layer, layer=number) for number in range(LARGE_LAYERS)]
    else:
        layers = [partial(many_files, count=chosen.files)]
    with tempfile.TemporaryDirectory(prefix="cubecache-large-") as folder:
        root = Path(folder)
        write_layout(root / "image", layers)
        state, store = root / "state", (root / "store").as_uri()
        command = [COMMAND, "--state-dir", str(state), "--store", store]
        cost, said = measured([[*command, "preload", f"oci:{root / 'image'}:latest", "--json"]])
        found = {
            "machine": machine(),
            "commit": commit(),
            "what": "20 GB" if chosen.large else f"{chosen.files} files",
            "wall_seconds": cost.wall,
            "cpu_seconds": cost.cpu,
            "peak_bytes_of_all_processes": cost.memory,
            "peak_bytes_of_the_largest_process": largest_process(),
            "built": json.loads(said),
            "attach": asyncio.run(attached(state, store)),
        }
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
