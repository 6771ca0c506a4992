"""Scrub: reads what a realm stores, all or a sample, at a chosen rate, and holds it to its names.

Packs are named by the digest of their stored bytes, so one pass of BLAKE3 over a pack finds every
kind of damage; which chunks are hit is looked at only then. Packs are read in the order of their
names; the last one is written down, so that a scrub that was ended goes on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from imagecache.blockimage.envelope import MAX_PLAINTEXT, unseal
from imagecache.blockimage.jsonrecord import MAX_RECORD, decode_record, encode_record, text
from imagecache.blockimage.locations import pack_name
from imagecache.blockimage.records import AliasRecord, LayerRecord, RootRecord
from imagecache.blockimage.seals import Seals
from imagecache.catalog import Catalog, key_of
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.chunks.codec import decode_chunk
from imagecache.errors import Corrupt, CubecacheError, Denied, NotFound
from imagecache.packs.pack import MAX_BYTES, TRAILER, PackedChunk, read_table, read_trailer
from imagecache.repair.damage import Damage, quarantine
from imagecache.repair.presence import BROKEN, PresenceCheck
from imagecache.store.base import ObjectStat, RangeReader

SEALED = ("indexes", "manifests", "locations", "profiles", "boottables")
SAVE_EVERY = 16


@dataclass(slots=True)
class ScrubReport:
    """One scrub; sizes in stored bytes."""

    packs: int = 0
    objects: int = 0
    read_bytes: int = 0
    whole: bool = False  # the end of the realm was reached
    damage: list[Damage] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The object that `scrub --json` prints."""
        return {
            "packs": self.packs,
            "objects": self.objects,
            "read_bytes": self.read_bytes,
            "whole": self.whole,
            "damage": [found.as_json() for found in self.damage],
        }


@dataclass(frozen=True, slots=True)
class ScrubWishes:
    """`share` of the packs to read, 0 to 1; bytes per second, 0: no limit; packs at the most."""

    share: float = 1.0
    bytes_per_second: int = 0
    max_packs: int = 0
    from_start: bool = False


class Scrubber:
    """One scrub of one realm; used once."""

    def __init__(
        self,
        catalog: Catalog,
        reader: RangeReader,
        wishes: ScrubWishes | None = None,
        *,
        dice: random.Random | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._reader = reader
        self._wishes = wishes or ScrubWishes()
        self._dice = dice or random.Random()
        self._sleep = sleep
        self._report = ScrubReport()
        self._damaged: set[str] = set()

    async def run(self) -> ScrubReport:
        """Reads; damaged packs are quarantined. Raises Unavailable or Denied of the store."""
        generations = await self._catalog.readable_generations()
        for generation in generations:
            await self._inside(generation)
        await self._names()
        await self._present()
        await self._packs()
        return self._report

    def _add(self, key: str, what: str, chunks: tuple[bytes, ...] = ()) -> None:
        if key not in self._damaged:
            self._damaged.add(key)
            self._report.damage.append(Damage(key, what, chunks))

    async def _pay(self, count: int) -> None:
        self._report.read_bytes += count
        if self._wishes.bytes_per_second:
            await self._sleep(count / self._wishes.bytes_per_second)

    # --- what lies inside a generation

    async def _inside(self, generation: int) -> None:
        prefix = self._catalog.keys.within(generation)
        listed = [stat async for stat in self._store.list(prefix)]
        for stat in listed:
            kind, _, name = stat.key.removeprefix(prefix).partition("/")
            fault = await self._object_fault(stat, kind, name)
            self._report.objects += 1
            if fault is not None:
                self._add(stat.key, fault)

    async def _object_fault(self, stat: ObjectStat, kind: str, name: str) -> str | None:
        try:
            raw = await self._store.get(stat.key, limit=MAX_PLAINTEXT)
        except NotFound:
            return None  # collected meanwhile; what is needed is looked for below
        except BROKEN as error:  # a broken seal
            return str(error)
        await self._pay(len(raw))
        try:
            await asyncio.to_thread(self._judge, kind, name, raw)
        except (CubecacheError, ValueError) as error:
            return str(error)
        return None

    def _judge(self, kind: str, name: str, raw: bytes) -> None:
        if kind in SEALED:
            unseal(raw, bytes.fromhex(name))
        elif kind == "blobs":
            self._catalog.check_blob(name.replace("-", ":", 1), raw)
        elif kind == "roots":
            root = RootRecord.decode(raw)
            if f"{key_of(root).digest()}.json" != name or root.realm != self._catalog.keys.realm:
                raise Corrupt("it is the root of another image")
        elif kind == "layers":
            record = LayerRecord.decode(raw)
            if not name.startswith(f"{record.diff_id.replace(':', '-')}."):
                raise Corrupt("it is the record of another layer")
        elif kind == "bootpacks" and blake3(raw).hexdigest() != name:
            raise Corrupt("the boot pack does not match its digest")

    async def _names(self) -> None:
        listed = [stat async for stat in self._store.list(self._catalog.keys.aliases)]
        for stat in listed:
            try:
                record = AliasRecord.decode(await self._store.get(stat.key, limit=MAX_RECORD))
                if self._catalog.keys.alias(record.repository, record.tag) != stat.key:
                    raise Corrupt("it is the record of another name")
            except NotFound:
                continue
            except BROKEN as error:
                self._add(stat.key, str(error))

    async def _present(self) -> None:
        """What is gone is found from what names it."""
        check = PresenceCheck(self._catalog, self._reader)
        async for root in self._roots():
            for found in await check.check(root):
                self._add(found.key, found.what, found.chunks)

    async def _roots(self) -> AsyncIterator[RootRecord]:
        """Every root that can be read, each from its newest generation; the others were found."""
        seen: set[str] = set()
        for generation in await self._catalog.readable_generations():
            prefix = self._catalog.keys.roots(generation)
            for key in [stat.key async for stat in self._store.list(prefix)]:
                if key.removeprefix(prefix) in seen:
                    continue
                try:
                    root = RootRecord.decode(await self._store.get(key, limit=MAX_RECORD))
                except BROKEN:
                    continue
                seen.add(key.removeprefix(prefix))
                yield root

    # --- packs

    async def _packs(self) -> None:
        prefix = self._catalog.keys.all_packs
        listed = sorted([stat async for stat in self._store.list(prefix)], key=lambda x: x.key)
        position = "" if self._wishes.from_start else await self._position()
        waiting = [stat for stat in listed if stat.key > position]
        for number, stat in enumerate(waiting, 1):
            if self._wishes.max_packs and self._report.packs >= self._wishes.max_packs:
                await self._save(waiting[number - 2].key)
                return
            if self._wishes.share >= 1 or self._dice.random() < self._wishes.share:
                await self._pack(stat)
            if number % SAVE_EVERY == 0:
                await self._save(stat.key)
        self._report.whole = True
        await self._save("")

    async def _pack(self, stat: ObjectStat) -> None:
        generation, _, digest = stat.key.removeprefix(self._catalog.keys.all_packs).partition("/")
        try:
            name = pack_name(bytes.fromhex(digest), int(generation))
        except ValueError:
            self._add(stat.key, "it is no pack")
            return
        try:
            raw = await self._store.get(stat.key, limit=MAX_BYTES)
        except NotFound:
            return
        except CubecacheError as error:
            if not isinstance(error, BROKEN):
                raise
            raw = b""
        self._report.packs += 1
        await self._pay(len(raw))
        seals = self._catalog.seals
        chunks = await asyncio.to_thread(_damaged_chunks, raw, bytes.fromhex(digest), seals)
        if chunks is not None:
            await quarantine(self._catalog, name, await self._hit(name, raw, chunks))
            self._add(stat.key, "it does not match its digest", chunks)

    async def _hit(self, name: bytes, raw: bytes, chunks: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Chunks that images look for in a damaged pack and do not find there.

        The pack's own table may be damaged too, so those that the images name are asked for.
        """
        found = set(chunks)
        async for root in self._roots():
            if name.hex() not in root.packs:
                continue
            try:
                manifest = await self._catalog.block_manifest(root)
                table = await self._catalog.location_table(root)
            except BROKEN:
                continue
            for ordinal in range(len(table)):
                place = table.locate(ordinal)
                if place.pack != name:
                    continue
                digest = manifest.chunks.digest(ordinal)
                row = PackedChunk(
                    digest,
                    place.offset,
                    place.stored_length,
                    manifest.chunks.sizes[ordinal],
                    place.codec,
                    place.key_id,
                )
                if not _is_intact(self._catalog.seals, row, raw):
                    found.add(digest)
        return tuple(sorted(found))

    async def _position(self) -> str:
        try:
            raw = await self._store.get(self._catalog.keys.scrub_position, limit=MAX_RECORD)
            return text(decode_record("scrub", raw), "after")
        except BROKEN:
            return ""

    async def _save(self, after: str) -> None:
        key = self._catalog.keys.scrub_position
        await self._store.put(key, encode_record("scrub", {"after": after}))


def _is_intact(seals: Seals, row: PackedChunk, raw: bytes) -> bool:
    """Whether a pack's bytes have the chunk that a row of a table names."""
    try:
        stored = raw[row.offset : row.offset + row.stored_length]
        opened = seals.open_chunk(row.key_id, row.digest, stored)
        return chunk_digest(decode_chunk(row.codec, opened, row.blocks * BLOCK)) == row.digest
    except Corrupt:
        return False


def _damaged_chunks(raw: bytes, digest: bytes, seals: Seals) -> tuple[bytes, ...] | None:
    """None for a pack that is what its name says; else the chunks of its table that are not."""
    if blake3(raw).digest() == digest:
        return None
    try:
        trailer = read_trailer(raw[-TRAILER.size :], len(raw))
        end = len(raw) - TRAILER.size
        rows = read_table(raw[end - trailer.table_bytes : end], len(raw), trailer.key_id, seals)
    except (Corrupt, Denied):  # a flipped key id names a secret that nobody has
        return ()
    return tuple(row.digest for row in rows if not _is_readable(seals, row, raw))


def _is_readable(seals: Seals, row: PackedChunk, raw: bytes) -> bool:
    try:
        return _is_intact(seals, row, raw)
    except Denied:
        return False
