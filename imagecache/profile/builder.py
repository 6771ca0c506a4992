"""Writing a boot pack: the chunks of a plan, in its order, as one object."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imagecache.blockimage.keys import RealmKeys
from imagecache.blockimage.seals import NO_KEY, PackKey
from imagecache.cache.decode import Wanted, decode_all
from imagecache.cache.image import ImageMap
from imagecache.cache.plan import plan_gets
from imagecache.chunks import BLOCK
from imagecache.chunks.codec import ChunkEncoder
from imagecache.errors import Corrupt
from imagecache.packs.pack import PackWriter
from imagecache.profile.boot import MAX_BOOT_BYTES, MAX_ENTRIES, BootTable
from imagecache.store.base import Priority, RangeReader, Store

_STEP = 64
_MAX_GET = 4 << 20
_MAX_GAP = 64 << 10

Local = Callable[[bytes], Awaitable[bytes | None]]
"""A host's verified plaintext of a chunk by digest, or None."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    digest: bytes
    blocks: int
    codec: int
    stored: bytes
    key_id: int


class BootBuilder:
    """Builds boot packs for images of one realm."""

    def __init__(
        self,
        store: Store,
        reader: RangeReader,
        keys: RealmKeys,
        *,
        scratch: Path,
        local: Local | None = None,
        pack_key: PackKey | None = None,
    ) -> None:
        """`scratch` is a directory for the pack while it is written; `local` saves GETs."""
        self._pack_key = pack_key
        self._store = store
        self._reader = reader
        self._keys = keys
        self._scratch = scratch
        self._local = local

    async def build(
        self,
        image: ImageMap,
        ordinals: Sequence[int],
        *,
        block_image: bytes,
        profile: bytes,
        generation: int,
    ) -> BootTable | None:
        """Stores the pack and returns its table; None where nothing is to be packed.

        The chunks are verified before they are packed; Corrupt where the store has one wrong.
        """
        chosen = list(_fitting(image, ordinals))
        if not chosen:
            return None
        writer = PackWriter(self._pack_key)
        await asyncio.to_thread(self._scratch.mkdir, parents=True, exist_ok=True)
        folder = await asyncio.to_thread(tempfile.mkdtemp, dir=self._scratch, prefix="boot-")
        path = Path(folder) / "pack"
        try:
            await asyncio.to_thread(_append, path, writer.start())
            for at in range(0, len(chosen), _STEP):
                group = await self._encoded(image, chosen[at : at + _STEP])
                body = b"".join(
                    writer.add(x.digest, x.stored, blocks=x.blocks, codec=x.codec, key_id=x.key_id)
                    for x in group
                )
                await asyncio.to_thread(_append, path, body)
            tail, name = writer.finish()
            await asyncio.to_thread(_append, path, tail)
            await self._store.put(self._keys.boot_pack(name, generation), path)
        finally:
            await asyncio.to_thread(_remove, path)
        return BootTable(block_image, profile, name, writer.length, writer.entries)

    async def _encoded(self, image: ImageMap, ordinals: Sequence[int]) -> list[_Encoded]:
        found: dict[int, _Encoded] = {}
        missing: list[int] = []
        for ordinal in ordinals:
            digest = image.digest(ordinal)
            plaintext = await self._local(digest) if self._local is not None else None
            if plaintext is None:
                missing.append(ordinal)
                continue
            found[ordinal] = await asyncio.to_thread(self._sealed, digest, plaintext)
        places = [image.location(ordinal) for ordinal in missing]
        for get in plan_gets(places, max_bytes=_MAX_GET, max_gap=_MAX_GAP):
            key = image.pack_key(get.pack)
            body = await self._reader.read(key, get.offset, get.length, priority=Priority.FILL)
            members = [missing[number] for number in get.members]
            wanted = [
                Wanted(image.location(n), image.length(n), image.digest(n), image.seals)
                for n in members
            ]
            decoded = await asyncio.to_thread(decode_all, body, get.offset, wanted)
            for ordinal, chunk, outcome in zip(members, wanted, decoded, strict=True):
                if isinstance(outcome, Corrupt):
                    raise outcome
                start = chunk.location.offset - get.offset
                stored = body[start : start + chunk.location.stored_length]
                found[ordinal] = _Encoded(
                    chunk.digest,
                    chunk.length // BLOCK,
                    chunk.location.codec,
                    stored,
                    chunk.location.key_id,
                )
        return [found[ordinal] for ordinal in ordinals]

    def _sealed(self, digest: bytes, plaintext: bytes) -> _Encoded:
        codec, stored = ChunkEncoder().encode(plaintext)
        key_id = NO_KEY
        if self._pack_key is not None:
            key_id, stored = self._pack_key.key_id, self._pack_key.seal_chunk(digest, stored)
        return _Encoded(digest, len(plaintext) // BLOCK, int(codec), stored, key_id)


def _fitting(image: ImageMap, ordinals: Sequence[int]) -> Iterator[int]:
    size = 0
    for count, ordinal in enumerate(ordinals):
        size += image.stored_length(ordinal)
        if count >= MAX_ENTRIES or size > MAX_BOOT_BYTES:
            return
        yield ordinal


def _append(path: Path, piece: bytes) -> None:
    with path.open("ab") as file:
        file.write(piece)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.rmdir()
