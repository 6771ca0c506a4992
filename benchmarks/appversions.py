"""An application layer in several versions, made of the files of a real package layer."""

from __future__ import annotations

import gzip
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import zstandard
from cutting import LayerBlob, layout_layers
from imagemaker.entries import Entry, directory, write_tar
from imagemaker.layout import LayerSource, Settings, write_layout

SOURCE = "usr/lib/python3/dist-packages/numpy/"
PACKAGE = "app/linalg/"
UPGRADED = ("app/core/", "app/lib/")
SCATTERED = 10


@dataclass(frozen=True)
class Version:
    """A later version of the layer, and what its changed files alone are, compressed one by one."""

    layer: LayerBlob
    changed_bytes: int


class Application:
    """The first version; one with every Python file of a package changed; one with ten such files
    changed, here and there; one with every Python file changed; one with every shared object
    changed; one with every file of two large packages changed, as by an upgrade.

    A change is a line put into the middle of a file.
    """

    def __init__(self, blob: Path, folder: Path) -> None:
        self._folder = folder
        files: dict[str, bytes] = {}
        with gzip.open(blob) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            for member in tar:
                if member.isreg() and member.name.startswith(SOURCE):
                    content = tar.extractfile(member)
                    if content is not None:
                        files["app/" + member.name.removeprefix(SOURCE)] = content.read()
        self._files = files
        sources = sorted(name for name in files if name.endswith(".py") and files[name])
        self.first = self._layer("first", {})
        self.package = self._version("package", [n for n in sources if n.startswith(PACKAGE)])
        objects = sorted(name for name in files if name.endswith(".so"))
        self.compiled = self._version("compiled", objects)
        self.sources = self._version("sources", sources)
        upgraded = [n for n in sorted(files) if n.startswith(UPGRADED) and files[n]]
        self.upgraded = self._version("upgraded", upgraded)
        self.scattered = self._version("scattered", random.Random(11).sample(sources, SCATTERED))

    def _version(self, name: str, paths: list[str]) -> Version:
        changed = {}
        for path in paths:
            lines = self._files[path].splitlines(keepends=True)
            lines.insert(len(lines) // 2, b"# changed\n")
            changed[path] = b"".join(lines)
        compressor = zstandard.ZstdCompressor(level=3)
        alone = sum(len(compressor.compress(content)) for content in changed.values())
        return Version(self._layer(name, changed), alone)

    def _layer(self, name: str, changed: dict[str, bytes]) -> LayerBlob:
        folders = {
            "/".join(path.split("/")[:depth])
            for path in self._files
            for depth in range(1, path.count("/") + 1)
        }
        entries = [*map(directory, sorted(folders))]
        entries += [Entry(n, content=changed.get(n, body)) for n, body in self._files.items()]
        tar = self._folder / f"{name}.tar"
        tar.write_bytes(write_tar(entries))
        layout = self._folder / f"{name}.layout"
        write_layout(layout, "latest", [LayerSource(tar, "none", name)], Settings(), epoch=0)
        return layout_layers(layout)[0]
