"""Repair: images that have damage are built again from their source, while it exists.

The build is an ordinary one that relies on nothing damaged: it writes what is missing into the
active generation, where most packs come out as they were, byte by byte, under the same names, and
then a new root. The block image must come out with the same digest, or nothing is said to be
repaired. What nobody names any more is left to collection.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from imagecache.blockimage.holdings import PinRecord
from imagecache.blockimage.jsonrecord import MAX_RECORD
from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.locations import split_pack_name
from imagecache.blockimage.manifest import Face
from imagecache.blockimage.records import AliasRecord, LayerRecord, RootRecord
from imagecache.catalog import Catalog, key_of
from imagecache.errors import Corrupt, CubecacheError, Denied, NotFound, Unavailable
from imagecache.packs.pack import MAX_BYTES
from imagecache.repair.damage import quarantined_packs
from imagecache.repair.presence import BROKEN, PresenceCheck
from imagecache.store.base import RangeReader
from imagecache.verify import Verifier

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Broken:
    """An image with damage. `root` is None where the root record itself cannot be read."""

    key: str
    root: RootRecord | None
    image: str
    face: Face
    options: str
    faults: tuple[str, ...]
    packs: frozenset[str]  # in hex, that must not be relied on


Rebuild = Callable[[AliasRecord, Broken], Awaitable[str]]
"""Builds an image again under its name, relying on nothing broken; the block image in hex."""


@dataclass(slots=True)
class RepairReport:
    """What was found, and what became of it."""

    images: int = 0
    broken: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # what -> why
    dropped: list[str] = field(default_factory=list)  # keys of unreadable records

    def as_json(self) -> dict[str, Any]:
        """The object that `repair --json` prints."""
        return {name: getattr(self, name) for name in self.__slots__}


class Repairer:
    """Repairs one realm; used once."""

    def __init__(
        self,
        catalog: Catalog,
        reader: RangeReader,
        rebuild: Rebuild,
        *,
        faces: Iterable[tuple[Face, str]],
        read_all: bool = False,
        drop: bool = False,
    ) -> None:
        """`faces`: (face, options) that an image without a readable root may have been built in.

        `read_all` reads every chunk to find damage; else what is marked, missing or short counts.
        `drop` deletes unreadable roots and names that nobody can derive again.
        """
        self._catalog = catalog
        self._store = catalog.store
        self._reader = reader
        self._rebuild = rebuild
        self._faces = tuple(faces)
        self._read_all = read_all
        self._drop = drop
        self._report = RepairReport()
        self._marked: set[bytes] = set()
        self._sound: set[str] = set()

    async def run(self, only: str | None = None) -> RepairReport:
        """Repairs every broken image, or one, by manifest digest.

        Raises Unavailable or Denied of the store; what cannot be rebuilt is in the report.
        """
        names = await self._names()
        for broken in await self._find(names):
            if only is None or broken.image == only:
                await self._repair(broken, names)
        await self._heal_markers()
        self._marked = await quarantined_packs(self._catalog)
        await self._drop_layer_records()
        return self._report

    # --- finding

    async def _names(self) -> list[AliasRecord]:
        """Names that images can be asked for by; damaged ones are told, not guessed."""
        found = []
        for key in [stat.key async for stat in self._store.list(self._catalog.keys.aliases)]:
            try:
                record = AliasRecord.decode(await self._store.get(key, limit=MAX_RECORD))
                if self._catalog.keys.alias(record.repository, record.tag) != key:
                    raise Corrupt("it is the record of another name")
                found.append(record)
            except NotFound:
                continue
            except BROKEN as error:
                if self._drop:
                    await self._store.delete(key)
                    self._report.dropped.append(key)
                    continue
                self._report.failed[key] = f"{error}: preload that name again, or --drop it"
        for key in [stat.key async for stat in self._store.list(self._catalog.keys.pins)]:
            try:
                pin = PinRecord.decode(await self._store.get(key, limit=MAX_RECORD))
            except BROKEN:
                continue
            known = [name for name in found if name.image == pin.image]
            if not known:
                found.append(AliasRecord("", "", pin.name, pin.image))
        return found

    async def _find(self, names: list[AliasRecord]) -> list[Broken]:
        found: list[Broken] = []
        seen: set[str] = set()
        check = PresenceCheck(self._catalog, self._reader, read_indexes=True)
        for generation in await self._catalog.readable_generations():
            prefix = self._catalog.keys.roots(generation)
            for key in [stat.key async for stat in self._store.list(prefix)]:
                name = key.removeprefix(prefix)
                if name in seen:  # a newer generation has it
                    await self._drop_unreadable(key)
                    continue
                seen.add(name)
                self._report.images += 1
                broken = await self._look(key, name, names, check)
                if broken is not None:
                    found.append(broken)
                    self._report.broken.append(broken.image or key)
        return found

    async def _look(
        self, key: str, name: str, names: list[AliasRecord], check: PresenceCheck
    ) -> Broken | None:
        try:
            root = RootRecord.decode(await self._store.get(key, limit=MAX_RECORD))
            if f"{key_of(root).digest()}.json" != name:
                raise Corrupt("it is the root of another image")
        except NotFound:
            return None
        except (*BROKEN, KeyError) as error:
            return self._unreadable(key, name, names, str(error))
        damage = await check.check(root)
        faults = [f"{found.key}: {found.what}" for found in damage]
        bad = {found.key for found in damage}
        packs = {pack for pack in root.packs if self._key(pack) in bad}
        if self._read_all and not damage:
            manifest = await self._catalog.block_manifest(root)
            table = await self._catalog.location_table(root)
            verifier = Verifier(self._catalog, self._reader, manifest, table)
            damaged = set((await verifier.run(lambda _: None)).damaged)
            for ordinal in range(len(table)):
                if manifest.chunks.digest(ordinal).hex() in damaged:
                    packs.add(table.locate(ordinal).pack.hex())
            faults += [f"chunk {chunk}" for chunk in sorted(damaged)]
        if not faults:
            return None
        face = Face.parse(root.face)
        return Broken(key, root, root.image, face, root.options, tuple(faults), frozenset(packs))

    def _key(self, pack: str) -> str:
        return self._catalog.keys.pack(bytes.fromhex(pack))

    def _unreadable(self, key: str, name: str, names: list[AliasRecord], why: str) -> Broken:
        """A root that cannot be read is still known by the names of images."""
        for image in {alias.image for alias in names}:
            for face, options in self._faces:
                if f"{ImageKey(image, face, options).digest()}.json" == name:
                    return Broken(key, None, image, face, options, (why,), frozenset())
        return Broken(key, None, "", Face.EROFS, "", (why,), frozenset())

    # --- mending

    async def _repair(self, broken: Broken, names: list[AliasRecord]) -> None:
        what = broken.image or broken.key
        candidates = [name for name in names if name.image == broken.image]
        if not candidates:
            if broken.root is None and self._drop:
                await self._drop_unreadable(broken.key)
                return
            self._report.failed[what] = (
                "no name says where it came from: preload it again"
                if broken.root is not None
                else "no name leads to it: --drop gives it up"
            )
            return
        why = "nothing tried"
        for name in candidates:
            try:
                block_image = await self._rebuild(name, broken)
            except (Unavailable, Denied) as error:
                why = str(error)
                continue
            except CubecacheError as error:
                why = str(error)
                continue
            if broken.root is not None and block_image != broken.root.block_image:
                why = f"{name.name} was built as {block_image} now"
                continue
            self._report.repaired.append(what)
            log.info("repaired %s from %s", what, name.name)
            if broken.root is None:
                await self._drop_unreadable(broken.key)
            return
        self._report.failed[what] = why

    async def _drop_unreadable(self, key: str) -> None:
        """Removes a root record that is still unreadable: its image has another by now."""
        try:
            root = RootRecord.decode(await self._store.get(key, limit=MAX_RECORD))
            if not key.endswith(f"/{key_of(root).digest()}.json"):
                raise Corrupt("it is the root of another image")
        except NotFound:
            return
        except (*BROKEN, KeyError):
            await self._store.delete(key)
            self._report.dropped.append(key)

    async def _drop_layer_records(self) -> None:
        """Layer records that lead to damage go: without one, a layer is built when it is wanted."""
        for generation in await self._catalog.readable_generations():
            prefix = self._catalog.keys.layers(generation)
            for key in [stat.key async for stat in self._store.list(prefix)]:
                try:
                    await self._require_sound(key, generation)
                except BROKEN:
                    await self._store.delete(key)
                    self._report.dropped.append(key)

    async def _require_sound(self, key: str, generation: int) -> None:
        catalog = self._catalog
        record = LayerRecord.decode(await self._store.get(key, limit=MAX_RECORD))
        if catalog.keys.layer(record.diff_id, generation) != key:
            raise Corrupt("it is the record of another layer")
        await catalog.sealed("indexes", bytes.fromhex(record.index), generation)
        await catalog.sealed("locations", bytes.fromhex(record.locations), generation)
        for pack in record.packs:
            if pack not in self._sound:
                await self._store.stat(self._key(pack))
                if bytes.fromhex(pack) in self._marked:
                    raise Corrupt("it relies on a pack that is quarantined")
                self._sound.add(pack)

    async def _heal_markers(self) -> None:
        """Markers go from packs that are right again."""
        for pack in sorted(await quarantined_packs(self._catalog)):
            _, digest = split_pack_name(pack)
            try:
                raw = await self._store.get(self._catalog.keys.pack(pack), limit=MAX_BYTES)
            except BROKEN:
                continue
            if blake3(raw).digest() == digest:
                await self._store.delete(self._catalog.keys.quarantined(pack))
