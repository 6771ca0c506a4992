"""Images for journeys: real ones by recipe, and small ones written by hand, whole or damaged."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imagemaker.entries import EPOCH, Entry, write_tar
from imagemaker.layout import LayerSource, Settings, write_layout
from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES

CACHE = Path(__file__).parents[2] / ".cache" / "images"


def recipe_layout(name: str) -> Path:
    """The OCI layout folder of a recipe (tag `latest`), made once per checkout."""
    return make(RECIPES[name], CACHE)


def reference(folder: Path, tag: str = TAG) -> str:
    return f"oci:{folder}:{tag}"


def write_image(
    folder: Path,
    layers: Sequence[Sequence[Entry]],
    settings: Settings | None = None,
    compression: str = "gzip",
) -> str:
    """Writes an image of hand-written layers, entries in the given order; its reference."""
    tars = [write_tar(layer, ordered=True) for layer in layers]
    return write_tars(folder, tars, settings, compression)


def write_tars(
    folder: Path,
    tars: Sequence[bytes],
    settings: Settings | None = None,
    compression: str = "gzip",
) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        sources = []
        for number, content in enumerate(tars):
            path = Path(scratch) / f"{number}.tar"
            path.write_bytes(content)
            sources.append(LayerSource(path, compression, "test"))
        write_layout(folder, TAG, sources, settings or Settings(), epoch=EPOCH)
    return reference(folder)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the manifest of a layout and makes the index name the changed one."""
    index = json.loads((folder / "index.json").read_bytes())
    descriptor = index["manifests"][0]
    manifest = json.loads(blob(folder, descriptor["digest"]).read_bytes())
    replaced = change(manifest)
    set_manifest(folder, json.dumps(manifest if replaced is None else replaced).encode())


def set_manifest(folder: Path, raw: bytes, media_type: str | None = None) -> None:
    """Makes `raw` the manifest that the layout's index names."""
    index = json.loads((folder / "index.json").read_bytes())
    descriptor = index["manifests"][0]
    descriptor["digest"] = add_blob(folder, raw)
    descriptor["size"] = len(raw)
    if media_type:
        descriptor["mediaType"] = media_type
    (folder / "index.json").write_text(json.dumps(index))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the config of a layout; manifest and index follow."""

    def swap(manifest: dict[str, Any]) -> None:
        config = json.loads(blob(folder, manifest["config"]["digest"]).read_bytes())
        change(config)
        raw = json.dumps(config).encode()
        manifest["config"]["digest"] = add_blob(folder, raw)
        manifest["config"]["size"] = len(raw)

    edit_manifest(folder, swap)


def add_blob(folder: Path, raw: bytes) -> str:
    digest = hashlib.sha256(raw).hexdigest()
    (folder / "blobs" / "sha256" / digest).write_bytes(raw)
    return f"sha256:{digest}"


def blob(folder: Path, digest: str) -> Path:
    return folder / "blobs" / Path(digest.replace(":", os.sep))


def layer_blobs(folder: Path) -> list[Path]:
    """The layers' compressed blobs from the bottom up."""
    index = json.loads((folder / "index.json").read_bytes())
    manifest = json.loads(blob(folder, index["manifests"][0]["digest"]).read_bytes())
    return [blob(folder, layer["digest"]) for layer in manifest["layers"]]
