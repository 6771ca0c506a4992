"""From a recipe to an OCI layout in the cache, each layer made once."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imagemaker import difference, distribution, tree
from imagemaker.entries import EPOCH, write_tar
from imagemaker.layout import LayerSource, architecture, write_layout
from imagemaker.recipes import Packages, Recipe, Wheels, Written

TAG = "latest"
_FORMAT = 1


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(recipe: Recipe, cache: Path) -> Path:
    """The folder of the recipe's OCI layout (tag `TAG`), made if it is not in `cache` yet.

    Raises `distribution.MakeImageError`. One maker at a time per cache, by a lock.
    """
    identity = f"{_FORMAT} {recipe.version} {distribution.suite()} {architecture()}"
    folder = cache / "layouts" / f"{recipe.name}-{_short(identity)}"
    if (folder / "index.json").exists():
        return folder
    with _locked(cache):
        # Made, perhaps, by whoever held the lock.
        if (folder / "index.json").exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        layers: list[LayerSource] = []
        installed: tuple[str, ...] = ()
        root: Path | None = None
        scratch: list[Path] = []
        try:
            for number, layer in enumerate(recipe.layers):
                target = cache / f"{recipe.name}.{number}.{os.getpid()}.tar"
                match layer:
                    case Packages():
                        installed += layer.names
                        upper = distribution.root_tar(cache, installed, variant=layer.variant)
                        if root is None:
                            target = upper
                        else:
                            scratch.append(target)
                            difference.write_difference(root, upper, target)
                        root = upper
                        made_by = f"mmdebstrap {' '.join(layer.names) or layer.variant}"
                    case Wheels():
                        scratch.append(target)
                        wheels = distribution.wheels_tree(cache, layer.requirements)
                        tree.write_tree(wheels, layer.prefix, target)
                        made_by = f"pip install {' '.join(layer.requirements)}"
                    case Written():
                        scratch.append(target)
                        target.write_bytes(write_tar(layer.entries()))
                        made_by = f"{recipe.name} layer {number}"
                layers.append(LayerSource(target, layer.compression, made_by))
            write_layout(folder, TAG, layers, recipe.settings, epoch=EPOCH)
        finally:
            for path in scratch:
                path.unlink(missing_ok=True)
    return folder


def _short(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:12]
