"""The command behind ./tools/make_image."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from imagemaker.distribution import MakeImageError
from imagemaker.layout import push
from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES

_CACHE = Path(__file__).parents[2] / ".cache" / "images"


def main() -> int:
    """Makes the image that the arguments name; prints one JSON object; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make_image", description="Make a real OCI image.")
    parser.add_argument("recipe", nargs="?", choices=sorted(RECIPES), metavar="RECIPE")
    parser.add_argument("--list", action="store_true", help="list the recipes")
    parser.add_argument("--cache", type=Path, default=_CACHE, help="default: .cache/images")
    parser.add_argument("--output", help="also copy it to oci:DIR[:TAG] (DIR must not exist)")
    parser.add_argument("--push", help="also push it to HOST:PORT/REPO:TAG over plain HTTP")
    chosen = parser.parse_args()
    if chosen.list:
        print("\n".join(sorted(RECIPES)))
        return 0
    if chosen.recipe is None:
        parser.error("which recipe? --list shows them")
    try:
        folder, tag = make(RECIPES[chosen.recipe], chosen.cache.resolve()), TAG
        if chosen.output:
            folder, tag = _copied(folder, chosen.output)
        if chosen.push:
            push(folder, tag, chosen.push)
    except (MakeImageError, OSError, subprocess.CalledProcessError) as error:
        print(f"make_image: {error}", file=sys.stderr)
        return 1
    manifest = json.loads((folder / "index.json").read_bytes())["manifests"][0]
    blob = folder / "blobs" / Path(manifest["digest"].replace(":", "/"))
    layers = json.loads(blob.read_bytes())["layers"]
    answer = {
        "reference": f"oci:{folder}:{tag}",
        "digest": manifest["digest"],
        "layers": layers,
        "stored_bytes": sum(layer["size"] for layer in layers),
    }
    print(json.dumps(answer))
    return 0


def _copied(layout: Path, output: str) -> tuple[Path, str]:
    scheme, _, rest = output.partition(":")
    text, _, tag = rest.partition(":")
    if scheme != "oci" or not text:
        raise MakeImageError(f"{output}: an output is oci:DIR[:TAG]")
    folder = Path(text).resolve()
    if folder.exists():
        raise MakeImageError(f"{folder} exists already")
    shutil.copytree(layout, folder)
    if tag and tag != TAG:
        path = folder / "index.json"
        index = json.loads(path.read_bytes())
        index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"] = tag
        path.write_text(json.dumps(index), encoding="utf-8")
    return folder, tag or TAG


if __name__ == "__main__":
    sys.exit(main())
