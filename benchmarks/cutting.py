"""Block images made straight from OCI layouts, by any cutting rule, into a folder of packs.

The parts that builds use (LayerConverter, assemble) without store, pipeline and processes, so that
a benchmark can vary the rule and count what would be stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from imagecache.blockimage.envelope import seal
from imagecache.blockimage.extents import ChunkList, Pieces
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import Location, LocationTable
from imagecache.blockimage.manifest import BlockManifest, Face
from imagecache.build.assemble import assemble
from imagecache.build.chunksink import FinishedPack
from imagecache.build.convert import LayerConverter
from imagecache.build.known import KnownChunks, in_few_packs
from imagecache.chunks import BLOCK
from imagecache.chunks.codec import DEFAULT_LEVEL, decode_chunk
from imagecache.chunks.cut import FORMAT_CUT_RULE, CutRule
from imagecache.flatten.filetable import FileTable
from imagecache.flatten.limits import Limits
from imagecache.imageview import ImageView

LIMITS = Limits()


@dataclass(frozen=True)
class LayerBlob:
    """One layer of an OCI layout."""

    path: Path
    diff_id: str


def layout_layers(layout: Path) -> list[LayerBlob]:
    """The layers of the layout's one image, bottom first."""

    def blob(digest: str) -> Path:
        return layout / "blobs" / digest.replace(":", "/")

    def load(digest: str) -> Any:
        return json.loads(blob(digest).read_bytes())

    index = json.loads((layout / "index.json").read_bytes())
    manifest = load(index["manifests"][0]["digest"])
    diff_ids = load(manifest["config"]["digest"])["rootfs"]["diff_ids"]
    return [
        LayerBlob(blob(layer["digest"]), diff_id)
        for layer, diff_id in zip(manifest["layers"], diff_ids, strict=True)
    ]


@dataclass(frozen=True)
class CutLayer:
    """A converted layer: plaintext index, locations by digest, and what it cost to store."""

    index: bytes
    table: LocationTable
    new_chunks: int
    stored_bytes: int  # packs and sealed objects

    @property
    def decoded(self) -> LayerIndex:
        """The layer index."""
        return LayerIndex.decode(self.index)

    def locations(self) -> dict[bytes, Location]:
        """Where its chunks are."""
        digests = (digest for digest, _ in self.decoded.chunks)
        return {digest: self.table.locate(n) for n, digest in enumerate(digests)}


@dataclass(frozen=True)
class CutImage:
    """An assembled image and what it added to a store that held `known` before."""

    layers: tuple[CutLayer, ...]
    manifest: BlockManifest
    table: LocationTable
    new_chunks: int
    stored_bytes: int
    index_bytes: int  # sealed indexes, manifest and location tables, of all its layers
    manifest_bytes: int  # plaintext of the block manifest alone

    def locations(self) -> dict[bytes, Location]:
        """Where its chunks are."""
        found = {digest: self.table.locate(n) for n, (digest, _) in enumerate(self.manifest.chunks)}
        for layer in self.layers:
            found |= layer.locations()
        return found

    def view(self) -> ImageView:
        """The image as files."""
        tables = [FileTable.decode(x.decoded.file_table, LIMITS) for x in self.layers]
        return ImageView(self.manifest, tables)


Convert = Callable[[LayerBlob, KnownChunks, "Workplace"], CutLayer]


@dataclass
class Workplace:
    """A folder for packs. `keep` keeps them, by name, for `PackReader`."""

    folder: Path
    keep: bool = False
    packed_bytes: int = 0
    packs: dict[bytes, Path] = field(default_factory=dict)
    _count: int = 0

    def announce(self, pack: FinishedPack) -> None:
        """Counts a pack; removes it where nobody is going to read it."""
        self.packed_bytes += pack.length
        if self.keep:
            self.packs[pack.name] = pack.path
        else:
            pack.path.unlink()

    def directory(self) -> Path:
        """A fresh output directory."""
        self._count += 1
        path = self.folder / f"output-{self._count}"
        path.mkdir(parents=True)
        return path

    def read(self, place: Location, blocks: int) -> bytes:
        """The plaintext of a chunk that a kept pack holds."""
        with self.packs[place.pack].open("rb") as pack:
            pack.seek(place.offset)
            return decode_chunk(place.codec, pack.read(place.stored_length), blocks * BLOCK)


def sealed_bytes(*plaintexts: bytes) -> int:
    """Stored bytes of sealed objects."""
    return sum(len(seal(plaintext)[1]) for plaintext in plaintexts)


def convert_by(rule: CutRule = FORMAT_CUT_RULE) -> Convert:
    """Conversion on the path that builds use."""

    def convert(layer: LayerBlob, known: KnownChunks, place: Workplace) -> CutLayer:
        before = place.packed_bytes
        converter = LayerConverter(
            place.directory(),
            known,
            place.announce,
            lambda _: None,
            limits=LIMITS,
            level=DEFAULT_LEVEL,
            rule=rule,
        )
        with layer.path.open("rb") as blob:
            made = converter.convert(blob, layer.diff_id)
        return CutLayer(
            made.index,
            LocationTable.decode(made.locations),
            made.new_chunks,
            place.packed_bytes - before + sealed_bytes(made.index, made.locations),
        )

    return convert


def cut_image(
    layers: Sequence[LayerBlob],
    convert: Convert,
    place: Workplace,
    *,
    known: dict[bytes, Location] | None = None,
    done: dict[str, CutLayer] | None = None,
) -> CutImage:
    """Builds an image where `known` chunks and the layers `done` are stored already."""
    done = {} if done is None else done
    references = in_few_packs(known or {})
    pool: dict[bytes, Location] = {}
    placed: list[CutLayer] = []
    new_chunks = stored = 0
    for layer in layers:
        made = done.get(layer.diff_id)
        if made is None:
            made = done[layer.diff_id] = convert(layer, KnownChunks(pool, references), place)
            new_chunks += made.new_chunks
            stored += made.stored_bytes
        placed.append(made)
        pool |= made.locations()
    before = place.packed_bytes
    image = assemble(
        place.directory(),
        [(x.decoded, blake3(x.index).digest()) for x in placed],
        KnownChunks(pool, references),
        place.announce,
        face=Face.EROFS,
        options="{}",
        limits=LIMITS,
        level=DEFAULT_LEVEL,
        generation=1,
    )
    sealed = sealed_bytes(image.manifest, image.locations)
    return CutImage(
        layers=tuple(placed),
        manifest=BlockManifest.decode(image.manifest),
        table=LocationTable.decode(image.locations),
        new_chunks=new_chunks + image.new_chunks,
        stored_bytes=stored + place.packed_bytes - before + sealed,
        index_bytes=sealed + sum(sealed_bytes(x.index, x.table.encode()) for x in placed),
        manifest_bytes=len(image.manifest),
    )


def write_pieces(
    chunks: ChunkList,
    pieces: Pieces,
    read: Callable[[int], bytes],
    target: Path,
) -> None:
    """Writes a region or disk as a sparse file; `read` gives a chunk's plaintext by ordinal."""
    with target.open("wb") as disk:
        at = used = 0
        body = b""
        for blocks, ordinal in zip(pieces.blocks, pieces.ordinals, strict=True):
            length = blocks * BLOCK
            if ordinal < len(chunks):
                if used == len(body):
                    body, used = read(ordinal), 0
                disk.seek(at)
                disk.write(body[used : used + length])
                used += length
            at += length
        disk.truncate(at)
