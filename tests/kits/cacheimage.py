"""Block images in a memory store, with their bytes, and readers that count, wait and break."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from imagecache.blockimage.extents import PieceBuilder
from imagecache.blockimage.locations import Location, LocationTable
from imagecache.blockimage.manifest import BlockManifest, Face, PlacedLayer, canonical_options
from imagecache.cache.image import ImageMap
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.chunks.codec import ChunkEncoder
from imagecache.errors import Unavailable
from imagecache.packs.pack import PackWriter
from imagecache.store.base import Priority
from imagecache.store.memory import MemoryReader, MemoryStore


def pack_key(name: bytes) -> str:
    return f"v1/default/packs/{name.hex()}"


def plaintext(rng: random.Random, blocks: int) -> bytes:
    """A chunk without a zero block, half of it compressible."""
    if rng.random() < 0.5:
        return b"".join(
            bytes([rng.randint(1, 255)]) + rng.randbytes(63) * 65 for _ in range(blocks)
        )[: blocks * BLOCK]
    return rng.randbytes(blocks * BLOCK)


@dataclass
class KitImage:
    """An image: what the store holds of it, what its disk reads as, and its chunks in order."""

    manifest: BlockManifest
    locations: LocationTable
    content: bytes
    chunks: list[bytes]

    def map(self) -> ImageMap:
        return ImageMap(self.manifest, self.locations, pack_key)

    def read(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length]


def make_image(
    store: MemoryStore,
    *,
    seed: int = 0,
    chunks: int = 20,
    blocks: int | None = None,
    packs: int = 2,
    holes: bool = True,
    shared: Sequence[bytes] = (),
) -> KitImage:
    """An image of `chunks` chunks of random sizes (or `blocks` each) in `packs` packs."""
    rng = random.Random(seed)
    builder, encoder = PieceBuilder(), ChunkEncoder()
    content = bytearray()
    plain = [plaintext(rng, blocks or rng.randint(1, 64)) for _ in range(chunks - len(shared))]
    plain += shared
    for chunk in plain:
        if holes and rng.random() < 0.5:
            gap = rng.randint(1, 90)
            builder.zeros(gap)
            content += bytes(gap * BLOCK)
        size = len(chunk) // BLOCK
        if holes and size > 3 and rng.random() < 0.3:
            runs = [(False, size - 2), (True, 3), (False, 2)]
        else:
            runs = [(False, size)]
        builder.chunk(chunk_digest(chunk), runs)
        at = 0
        for is_zero, count in runs:
            content += bytes(count * BLOCK) if is_zero else chunk[at : at + count * BLOCK]
            at += 0 if is_zero else count * BLOCK
    if holes:
        builder.zeros(7)
        content += bytes(7 * BLOCK)
    listed, pieces = builder.finish()
    places: list[Location] = []
    by_digest = {chunk_digest(chunk): chunk for chunk in plain}
    digests = [listed.digest(n) for n in range(len(listed))]
    per_pack = -(-len(digests) // packs)
    for at in range(0, len(digests), per_pack):
        writer = PackWriter()
        body = bytearray(writer.start())
        for digest in digests[at : at + per_pack]:
            codec, stored = encoder.encode(by_digest[digest])
            body += writer.add(
                digest, stored, blocks=len(by_digest[digest]) // BLOCK, codec=int(codec)
            )
        tail, name = writer.finish()
        body += tail
        store.objects[pack_key(name)] = bytes(body)
        places += [
            Location(name, entry.offset, entry.stored_length, entry.codec, 0)
            for entry in writer.entries
        ]
    manifest = BlockManifest(
        face=Face.EROFS,
        options=canonical_options({}),
        disk_blocks=pieces.total_blocks,
        metadata_blocks=1,
        window_blocks=1,
        layers=(PlacedLayer(chunk_digest(b"layer"), 1, pieces.total_blocks - 1),),
        chunks=listed,
        pieces=pieces,
    )
    manifest = BlockManifest.decode(manifest.encode())
    subject = chunk_digest(manifest.encode())
    table = LocationTable.build(subject, places)
    return KitImage(manifest, table, bytes(content), [by_digest[d] for d in digests])


@dataclass
class KitReader:
    """A reader that counts its reads, waits, and is away while `away` is set."""

    store: MemoryStore
    delay: float = 0.0
    away: bool = False
    hang: bool = False
    spoil: int = 0  # how many bodies yet to come have a bit flipped
    reads: list[tuple[str, int, int, Priority]] = field(default_factory=list)
    condemned: list[str] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:
        self.reads.append((key, offset, length, priority))
        if self.hang:
            await asyncio.get_running_loop().create_future()
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(self.delay)
        if self.away:
            raise Unavailable("the store is away")
        body = await MemoryReader(self.store).read(key, offset, length, priority=priority)
        if self.spoil:
            self.spoil -= 1
            flipped = bytearray(body)
            flipped[len(body) // 2] ^= 1
            body = bytes(flipped)
        return body

    def condemn(self, key: str) -> None:
        self.condemned.append(key)

    async def close(self) -> None:
        pass
