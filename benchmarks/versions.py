"""One image over many versions: its package layer is rebuilt each time, a little changed.

Every version changes the files of one directory (an upgrade), adds a package of a few files, and
appends to a database; so do real ones. What it stores, and how many GETs a reader that goes
through the whole disk needs, show whether reuse has broken the image into pieces.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cutting import CutImage, CutLayer, LayerBlob, Workplace, convert_by, cut_image
from imagemaker.entries import Entry, directory, write_tar

from imagecache.blockimage.locations import Location
from imagecache.cache.plan import plan_gets

DATABASE = "var/lib/dpkg/status"
FRESH_FILES = 12
WINDOW = 64
"""Extents that a sequential reader asks for ahead, at most (`imagecache.cache.readahead`)."""

MAX_GET, MAX_GAP = 4 << 20, 64 << 10


@dataclass(frozen=True)
class VersionRow:
    """One version; `whole` is the same image built into an empty store."""

    number: int
    stored: int
    new_chunks: int
    packs: int
    gets: int
    whole_stored: int
    whole_gets: int


def sequential_gets(image: CutImage) -> int:
    """GETs of a reader that goes through the whole disk, asking for windows of extents ahead."""
    extents = image.manifest.extents
    present: set[int] = set()
    gets = 0
    for start in range(0, len(extents), WINDOW):
        ordinals = dict.fromkeys(extents.ordinals[start : start + WINDOW])
        missing = [n for n in ordinals if n not in present]
        present.update(missing)
        places = [image.table.locate(n) for n in missing]
        gets += len(plan_gets(places, max_bytes=MAX_GET, max_gap=MAX_GAP))
    return gets


class History:
    """The layers of successive versions, made of a real package layer."""

    def __init__(self, layer: LayerBlob, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, bytes] = {}
        with gzip.open(layer.path) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            for member in tar:
                if member.isreg():
                    content = tar.extractfile(member)
                    if content is not None:
                        self._files[member.name] = content.read()

    def layers(self, count: int) -> Iterator[LayerBlob]:
        """The layer, version by version, from the first."""
        dice = random.Random(2)
        folders = sorted({name.rpartition("/")[0] for name in self._files})
        for number in range(1, count + 1):
            if number > 1:
                upgraded = dice.choice(folders)
                for name in [n for n in self._files if n.rpartition("/")[0] == upgraded]:
                    body = self._files[name]
                    self._files[name] = body[: len(body) // 2] + b"\n#" + body[len(body) // 2 :]
                place = f"usr/lib/python3/dist-packages/{dice.choice('abcdefghijk')}{number}"
                for name in dice.sample(sorted(self._files), FRESH_FILES):
                    body = self._files[name][: 64 << 10] + b"%d" % number
                    self._files[f"{place}/{name.rpartition('/')[2]}"] = body
                self._files[DATABASE] += b"Package: p%d\n\n" % number
            yield self._write(number)

    def _write(self, number: int) -> LayerBlob:
        folders = {
            "/".join(name.split("/")[:depth])
            for name in self._files
            for depth in range(1, name.count("/") + 1)
        }
        tar = write_tar(
            [
                *map(directory, sorted(folders)),
                *(Entry(name, content=body) for name, body in self._files.items()),
            ]
        )
        path = self._folder / f"version-{number}.tar"
        path.write_bytes(tar)
        return LayerBlob(path, f"sha256:{hashlib.sha256(tar).hexdigest()}")


def follow_versions(
    base: LayerBlob, package: LayerBlob, count: int, folder: Path, references: int = 3
) -> Iterator[VersionRow]:
    """Builds version after version, each knowing the last few, as the pipeline does."""
    place = Workplace(folder)
    kept: list[dict[bytes, Location]] = []
    done: dict[str, CutLayer] = {}
    for number, layer in enumerate(History(package, folder).layers(count), 1):
        known: dict[bytes, Location] = {}
        for image in kept[-references:][::-1]:
            known = {**image, **known}
        made = cut_image([base, layer], convert_by(), place, known=known, done=done)
        whole = cut_image([base, layer], convert_by(), place)
        kept.append(
            {digest: made.table.locate(n) for n, (digest, _) in enumerate(made.manifest.chunks)}
        )
        layer.path.unlink()
        yield VersionRow(
            number=number,
            stored=made.stored_bytes,
            new_chunks=made.new_chunks,
            packs=len(made.table.packs),
            gets=sequential_gets(made),
            whole_stored=whole.stored_bytes,
            whole_gets=sequential_gets(whole),
        )
