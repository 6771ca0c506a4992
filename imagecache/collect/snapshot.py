"""What a collection looks at: who relies on what, and what there is. Read in a careful order.

The time first, then generations, who names images, and roots and layer records from the oldest
generation to the newest: content moves from older to newer ones only, so what is missed in one is
found in a later one. The generations are read again at the end; where they moved, so is all else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from imagecache.blockimage.generations import Generation
from imagecache.blockimage.holdings import LeaseRecord, LeftRecord, PinRecord, TombstoneRecord
from imagecache.blockimage.records import MAX_RECORD, AliasRecord, LayerRecord, RootRecord
from imagecache.catalog import Catalog
from imagecache.collect.work import ForEach
from imagecache.errors import Busy, Corrupt, NotFound, Unavailable
from imagecache.store.base import ObjectStat

READS = 3


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as the store has it."""

    key: str
    record: LeaseRecord
    modified: float

    def holds(self, now: float) -> bool:
        """Whether it is in force at a time of the store."""
        return now - self.modified <= self.record.ttl_seconds


@dataclass(frozen=True, slots=True)
class HeldPin:
    """A pin as the store has it."""

    key: str
    record: PinRecord
    modified: float

    def holds(self, now: float) -> bool:
        """Whether it is in force at a time of the store."""
        return now - self.modified <= self.record.ttl_seconds


@dataclass(frozen=True, slots=True)
class Tombstones:
    """A batch of tombstones as the store has it."""

    key: str
    record: TombstoneRecord
    modified: float


@dataclass(frozen=True, slots=True)
class Holders:
    """Who relies on images, by name, lease or pin."""

    aliases: tuple[AliasRecord, ...]
    builders: tuple[Lease, ...]
    readers: tuple[Lease, ...]
    pins: tuple[HeldPin, ...]

    def live(self, now: float) -> frozenset[str]:
        """Manifest digests that somebody relies on."""
        found = {alias.image for alias in self.aliases}
        for reader in self.readers:
            if reader.holds(now):
                found.update(reader.record.images)
        found.update(pin.record.image for pin in self.pins if pin.holds(now))
        return frozenset(found)


Roots = dict[str, RootRecord]
"""Root records of one generation by the last part of their keys."""


@dataclass(frozen=True, slots=True)
class Mentions:
    """What one readable generation names."""

    roots: Roots
    layers: tuple[LayerRecord, ...]
    left: frozenset[str]  # packs that re-packing took out of these, in hex


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A realm as one collection sees it; times and sizes are the store's."""

    now: float
    generations: tuple[Generation, ...]
    holders: Holders
    mentions: dict[int, Mentions]  # by readable generation
    inside: dict[int, tuple[ObjectStat, ...]]  # objects of each generation but its packs
    packs: dict[str, ObjectStat]  # by name, in hex
    tombstones: tuple[Tombstones, ...]
    quarantined: dict[str, str]  # keys of markers, by the pack's name in hex

    @property
    def stored_bytes(self) -> int:
        """Bytes of all packs and of all that lies in generations."""
        inside = sum(stat.size for stats in self.inside.values() for stat in stats)
        return inside + sum(stat.size for stat in self.packs.values())

    @property
    def newest(self) -> int:
        """The number of the newest generation; 0 in an empty realm."""
        return max((generation.number for generation in self.generations), default=0)

    def marked(self) -> frozenset[str]:
        """Packs that count as named: also those that re-packing left in a readable generation.

        So no mention ever goes from a readable generation, whoever reads it in whatever order.
        """
        return self.named().union(*(mentions.left for mentions in self.mentions.values()))

    def named(self) -> frozenset[str]:
        """Packs that a readable generation or a reader in force names, in hex."""
        found: set[str] = set()
        for mentions in self.mentions.values():
            for root in mentions.roots.values():
                found.update(root.packs)
            for layer in mentions.layers:
                found.update(layer.packs)
        for reader in self.holders.readers:
            if reader.holds(self.now):
                found.update(reader.record.packs)
        return frozenset(found)


class _Moved(Exception):
    """A generation moved while it was read."""


class SnapshotReader:
    """Reads snapshots of one realm."""

    def __init__(
        self, catalog: Catalog, now: Callable[[], Awaitable[float]], for_each: ForEach
    ) -> None:
        self._catalog = catalog
        self._store = catalog.store
        self._keys = catalog.keys
        self._now = now
        self._for_each = for_each

    async def read(self) -> Snapshot:
        """A snapshot; Busy where generations keep moving, Unavailable for a doubtful listing.

        Raises Corrupt or Unsupported for a record that cannot be read: nothing is guessed.
        """
        for _ in range(READS):
            before = tuple(await self._catalog.generations())
            try:
                found = await self._read(before)
            except _Moved:
                continue
            if tuple(await self._catalog.generations()) == before:
                return found
        raise Busy("other collections keep moving generations", remedy="collect later")

    async def _read(self, generations: tuple[Generation, ...]) -> Snapshot:
        now = await self._now()  # what is renewed from here on is younger than this
        holders = await self.holders()
        inside = await self._inside()
        mentions = {}
        for generation in generations:
            if generation.readable:
                listed = {stat.key for stat in inside.get(generation.number, ())}
                mentions[generation.number] = await self._mentions(generation.number, listed)
        snapshot = Snapshot(
            now=now,
            generations=generations,
            holders=holders,
            mentions=mentions,
            inside=inside,
            packs=await self._packs(),
            tombstones=await self._tombstones(),
            quarantined=await self._quarantined(),
        )
        _require_plausible(snapshot)
        return snapshot

    async def holders(self) -> Holders:
        """Who relies on images at this time."""
        aliases = await self._records(self._keys.aliases)
        builders = await self._records(self._keys.build_leases)
        readers = await self._records(self._keys.reader_leases)
        pins = await self._records(self._keys.pins)
        return Holders(
            aliases=tuple(AliasRecord.decode(raw) for _, raw in aliases),
            builders=tuple(_lease(stat, raw) for stat, raw in builders),
            readers=tuple(_lease(stat, raw) for stat, raw in readers),
            pins=tuple(
                HeldPin(stat.key, PinRecord.decode(raw), stat.modified) for stat, raw in pins
            ),
        )

    async def roots(self, generation: int) -> Roots:
        """The roots of one generation."""
        found = await self._records(self._keys.roots(generation))
        return {stat.key.rsplit("/", 1)[1]: _root(stat.key, raw) for stat, raw in found}

    async def _mentions(self, generation: int, listed: set[str]) -> Mentions:
        """`listed` came from an earlier listing; here keys are only ever added."""
        roots, layers = self._keys.roots(generation), self._keys.layers(generation)
        found_roots = await self._records(roots)
        found_layers = await self._records(layers)
        # Last: what leaves the others meanwhile was written here before.
        left = self._keys.all_left(generation)
        found_left = await self._records(left)
        again = {stat.key for stat, _ in (*found_roots, *found_layers, *found_left)}
        lost = {key for key in listed if key.startswith((roots, layers, left))} - again
        if lost:
            if not (await self._catalog.state_of(generation)).readable:
                raise _Moved
            raise Unavailable(
                f"two listings of generation {generation} disagree: {min(lost)} is in one of them",
                remedy="nothing was deleted; ask doctor about the store",
            )
        return Mentions(
            {stat.key.rsplit("/", 1)[1]: _root(stat.key, raw) for stat, raw in found_roots},
            tuple(_layer(stat.key, raw) for stat, raw in found_layers),
            frozenset(pack for stat, raw in found_left for pack in _left(stat.key, raw).packs),
        )

    async def _inside(self) -> dict[int, tuple[ObjectStat, ...]]:
        prefix = f"{self._keys.prefix}g"
        found: dict[int, list[ObjectStat]] = {}
        async for stat in self._store.list(f"{prefix}0"):  # not `generations/`
            number = stat.key[len(prefix) : len(prefix) + 8]
            if number.isdecimal():
                found.setdefault(int(number), []).append(stat)
        return {number: tuple(stats) for number, stats in found.items()}

    async def _packs(self) -> dict[str, ObjectStat]:
        found: dict[str, ObjectStat] = {}
        async for stat in self._store.list(self._keys.all_packs):
            generation, _, digest = stat.key.removeprefix(self._keys.all_packs).partition("/")
            if generation.isdecimal() and len(digest) == 64:
                name = int(generation).to_bytes(4, "little").hex() + digest
                if name in found:
                    raise Unavailable(f"the listing of packs repeats {stat.key}")
                found[name] = stat
        return found

    async def _tombstones(self) -> tuple[Tombstones, ...]:
        found = await self._records(self._keys.collections)
        return tuple(
            Tombstones(stat.key, TombstoneRecord.decode(raw), stat.modified) for stat, raw in found
        )

    async def _quarantined(self) -> dict[str, str]:
        found = {}
        prefix = self._keys.quarantine
        async for stat in self._store.list(prefix):
            generation, _, digest = (
                stat.key.removeprefix(prefix).removesuffix(".json").partition("-")
            )
            if generation.isdecimal():
                found[int(generation).to_bytes(4, "little").hex() + digest] = stat.key
        return found

    async def _records(self, prefix: str) -> list[tuple[ObjectStat, bytes]]:
        """Every record below a prefix; what goes away between list and read is left out."""
        listed = [stat async for stat in self._store.list(prefix)]

        async def get(stat: ObjectStat) -> bytes | None:
            try:
                return await self._store.get(stat.key, limit=MAX_RECORD)
            except NotFound:
                return None

        raws = await self._for_each(get, listed)
        return [(stat, raw) for stat, raw in zip(listed, raws, strict=True) if raw is not None]


def _lease(stat: ObjectStat, raw: bytes) -> Lease:
    try:
        return Lease(stat.key, LeaseRecord.decode(raw), stat.modified)
    except Corrupt as error:
        raise _doubtful(stat.key, error) from error


def _root(key: str, raw: bytes) -> RootRecord:
    try:
        return RootRecord.decode(raw)
    except Corrupt as error:
        raise _doubtful(key, error) from error


def _layer(key: str, raw: bytes) -> LayerRecord:
    try:
        return LayerRecord.decode(raw)
    except Corrupt as error:
        raise _doubtful(key, error) from error


def _left(key: str, raw: bytes) -> LeftRecord:
    try:
        return LeftRecord.decode(raw)
    except Corrupt as error:
        raise _doubtful(key, error) from error


def _doubtful(key: str, error: Corrupt) -> Corrupt:
    return Corrupt(
        f"{key} cannot be read, so nobody knows what it relies on: {error.message}",
        remedy="nothing was deleted; run cubecache repair",
    )


def _require_plausible(snapshot: Snapshot) -> None:
    roots = any(mentions.roots for mentions in snapshot.mentions.values())
    if snapshot.holders.aliases and not roots and snapshot.packs:
        raise Unavailable(
            "the realm has names and packs, and the listing shows no image",
            remedy="nothing was deleted; ask doctor about the store",
        )
