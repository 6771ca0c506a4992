"""What a realm holds and what that costs: logical, unique and stored bytes, by image and by layer.

Logical bytes are those of all images' chunks, as if each image stood alone; unique ones are those
of distinct chunks; stored ones are what the bucket keeps. A realm is told of itself only.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from imagecache.blockimage.extents import ChunkList
from imagecache.blockimage.records import RootRecord
from imagecache.catalog import Catalog
from imagecache.chunks import BLOCK
from imagecache.verify import contiguous_runs

GIB = 1 << 30
MONTH_SECONDS = 30 * 86_400


@dataclass(frozen=True, slots=True)
class Prices:
    """What a store charges; the unit of money is the owner's. All 0: nothing is reckoned."""

    gib_month: float = 0.0
    thousand_writes: float = 0.0  # PUT, LIST
    thousand_reads: float = 0.0  # GET, HEAD
    gib_out: float = 0.0

    @property
    def known(self) -> bool:
        """Whether there is anything to reckon with."""
        return any((self.gib_month, self.thousand_writes, self.thousand_reads, self.gib_out))


@dataclass(slots=True)
class ImageAccount:
    """One image; bytes of plaintext. `alone` are those of chunks that no other image has.

    `requests` are the GETs that reading all of it from the store takes.
    """

    image: str
    names: list[str]
    logical_bytes: int
    alone_bytes: int
    stored_bytes: int
    requests: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class RealmAccount:
    """A realm. `objects` and `stored_bytes` are all that lies in it, garbage included."""

    images: list[ImageAccount] = field(default_factory=list)
    logical_bytes: int = 0
    unique_bytes: int = 0
    stored_bytes: int = 0
    objects: int = 0
    packs: int = 0
    pack_bytes: int = 0
    named_pack_bytes: int = 0

    @property
    def dedup(self) -> float:
        """How many bytes of images stand behind one byte of chunks."""
        return self.logical_bytes / self.unique_bytes if self.unique_bytes else 1.0

    def cost(self, prices: Prices, pulls_a_month: int = 0) -> dict[str, float]:
        """What the realm costs a month by a price table, with so many full reads of all images."""
        out = sum(image.stored_bytes for image in self.images) * pulls_a_month
        gets = sum(image.requests for image in self.images) * pulls_a_month
        return {
            "storage_month": self.stored_bytes / GIB * prices.gib_month,
            "written_once": self.objects / 1000 * prices.thousand_writes,
            "read_month": out / GIB * prices.gib_out + gets / 1000 * prices.thousand_reads,
        }

    def as_json(self) -> dict[str, Any]:
        """The object that `stats --json` prints."""
        return {
            "images": [
                {name: getattr(image, name) for name in image.__slots__} for image in self.images
            ],
            "logical_bytes": self.logical_bytes,
            "unique_bytes": self.unique_bytes,
            "stored_bytes": self.stored_bytes,
            "dedup": round(self.dedup, 3),
            "objects": self.objects,
            "packs": self.packs,
            "pack_bytes": self.pack_bytes,
            "garbage_pack_bytes": self.pack_bytes - self.named_pack_bytes,
        }


class Accountant:
    """Adds up one realm; used once."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._uses: dict[bytes, int] = {}  # chunk -> images that have it
        self._layer_uses: dict[bytes, int] = {}

    async def account(self) -> RealmAccount:
        """The realm's account; raises what reading its images raises."""
        result = RealmAccount()
        named: set[str] = set()
        names: dict[str, list[str]] = {}
        for alias in await self._catalog.aliases():
            names.setdefault(alias.image, []).append(alias.name)
        found: list[tuple[RootRecord, ChunkList]] = []
        layers: dict[bytes, ChunkList] = {}
        by_image: list[list[tuple[str, bytes]]] = []
        requests: list[int] = []
        async for root in self._catalog.roots():
            manifest = await self._catalog.block_manifest(root)
            found.append((root, manifest.chunks))
            named.update(root.packs)
            table = await self._catalog.location_table(root)
            # Root, manifest and location table, then the chunks in ranges.
            requests.append(3 + len(await asyncio.to_thread(contiguous_runs, table)))
            for digest, _ in manifest.chunks:
                self._uses[digest] = self._uses.get(digest, 0) + 1
            mine = []
            for diff_id, placed in zip(root.layers, manifest.layers, strict=True):
                mine.append((diff_id, placed.index))
                self._layer_uses[placed.index] = self._layer_uses.get(placed.index, 0) + 1
                if placed.index not in layers:
                    index = await self._catalog.layer_index(placed.index, root.generation)
                    layers[placed.index] = index.chunks
            by_image.append(mine)
        for (root, chunks), mine, gets in zip(found, by_image, requests, strict=True):
            account = self._image(root, chunks, names.get(root.image, []))
            account.requests = gets
            account.layers = [self._layer(diff_id, index, layers[index]) for diff_id, index in mine]
            result.images.append(account)
            result.logical_bytes += account.logical_bytes
        sizes = {digest: size for _, chunks in found for digest, size in chunks}
        result.unique_bytes = sum(sizes.values()) * BLOCK
        await self._objects(result, named)
        return result

    def _image(self, root: RootRecord, chunks: ChunkList, names: list[str]) -> ImageAccount:
        alone = sum(size for digest, size in chunks if self._uses[digest] == 1)
        return ImageAccount(
            image=root.image,
            names=sorted(names),
            logical_bytes=sum(chunks.sizes) * BLOCK,
            alone_bytes=alone * BLOCK,
            stored_bytes=root.packed_bytes,
        )

    def _layer(self, diff_id: str, index: bytes, chunks: ChunkList) -> dict[str, Any]:
        shared = sum(size for digest, size in chunks if self._uses.get(digest, 0) > 1)
        return {
            "diff_id": diff_id,
            "images": self._layer_uses[index],
            "bytes": sum(chunks.sizes) * BLOCK,
            "shared_bytes": shared * BLOCK,
        }

    async def _objects(self, result: RealmAccount, named: set[str]) -> None:
        keys = {self._catalog.keys.pack(bytes.fromhex(pack)) for pack in named}
        async for stat in self._catalog.store.list(self._catalog.keys.prefix):
            result.objects += 1
            result.stored_bytes += stat.size
            if stat.key.startswith(self._catalog.keys.all_packs):
                result.packs += 1
                result.pack_bytes += stat.size
                result.named_pack_bytes += stat.size if stat.key in keys else 0
