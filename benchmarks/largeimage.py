"""A large AI image: python-numpy, 5 GB of weights that do not compress, text and holes to 25 GB."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES
from large import noise_layer, sparse_layer, text_layer, write_layout

WEIGHTS_BYTES = 5_100_000_000
TEXT_BYTES = 1_000_000_000
APPARENT_BYTES = 25_000_000_000
FREE_BYTES = 50 << 30
WEIGHTS = "models/weights.bin"
PROGRAM = f"""import random
import numpy
size, dice, total = {WEIGHTS_BYTES}, random.Random(1), 0
with open("/{WEIGHTS}", "rb") as weights:
    for _ in range(64):
        weights.seek(dice.randrange(size - (1 << 20)))
        total += int(numpy.frombuffer(weights.read(1 << 20), dtype=numpy.uint8).sum())
print("hello from", size, "bytes of weights", total, flush=True)
""".encode()


def program_layer(tar: tarfile.TarFile) -> None:
    """The program in the place of python-numpy's."""
    member = tarfile.TarInfo("app/main.py")
    member.size = len(PROGRAM)
    tar.addfile(member, io.BytesIO(PROGRAM))


def large_layout(cache: Path) -> Path:
    """The image's layout below `cache`, made once; needs `FREE_BYTES` for a whole benchmark."""
    folder = cache / "large-25"
    if (folder / "oci-layout").exists():
        return folder
    if shutil.disk_usage(cache).free < FREE_BYTES:
        raise SystemExit(f"large: {cache} needs {FREE_BYTES >> 30} GiB free")
    shutil.rmtree(folder, ignore_errors=True)
    hole = APPARENT_BYTES - WEIGHTS_BYTES - TEXT_BYTES
    layers: list[Callable[[tarfile.TarFile], None]] = [
        partial(noise_layer, name=WEIGHTS, size=WEIGHTS_BYTES),
        partial(text_layer, layer=1, size=TEXT_BYTES),
        partial(sparse_layer, name="models/sparse.img", size=hole),
        program_layer,
    ]
    write_layout(folder, layers)
    (folder / "oci-layout").unlink()  # the mark of a whole one: written again at the end
    _put_below(folder, make(RECIPES["python-numpy"], cache))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def _read(folder: Path, digest: str) -> bytes:
    return (folder / "blobs/sha256" / digest.partition(":")[2]).read_bytes()


def _put_below(folder: Path, base: Path) -> None:
    """Makes the layers of `base` the lowest ones of the layout in `folder`."""

    def loaded(where: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        index = json.loads((where / "index.json").read_bytes())
        named = [
            m
            for m in index["manifests"]
            if m.get("annotations", {}).get("org.opencontainers.image.ref.name") == TAG
        ]
        manifest = json.loads(_read(where, named[0]["digest"]))
        return index, manifest, json.loads(_read(where, manifest["config"]["digest"]))

    def add(value: object) -> dict[str, object]:
        raw = json.dumps(value).encode()
        digest = hashlib.sha256(raw).hexdigest()
        (folder / "blobs/sha256" / digest).write_bytes(raw)
        return {"digest": f"sha256:{digest}", "size": len(raw)}

    index, manifest, config = loaded(folder)
    _, below, base_config = loaded(base)
    for layer in below["layers"]:
        name = layer["digest"].partition(":")[2]
        shutil.copy(base / "blobs/sha256" / name, folder / "blobs/sha256" / name)
    manifest["layers"] = below["layers"] + manifest["layers"]
    diffs = base_config["rootfs"]["diff_ids"] + config["rootfs"]["diff_ids"]
    config = {
        **config,
        "config": base_config.get("config", {}),
        "rootfs": {"type": "layers", "diff_ids": diffs},
    }
    manifest["config"].update(add(config))
    index["manifests"][0].update(add(manifest))
    (folder / "index.json").write_text(json.dumps(index))
