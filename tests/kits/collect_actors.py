"""Builders, collectors, readers and owners of a simulated realm, over the real code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kits.collect_world import Actor, Firm, StepStore, Violation, World, pack_generation

from imagecache.blockimage.extents import ChunkList, PieceBuilder, Pieces
from imagecache.blockimage.generations import State
from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import Location, LocationTable, pack_name
from imagecache.blockimage.manifest import BlockManifest, Face, PlacedLayer
from imagecache.blockimage.records import LayerRecord, RootRecord
from imagecache.build.pipeline import Builder, BuildSettings
from imagecache.build.progress import BuildResult
from imagecache.catalog import AliasName, Catalog
from imagecache.chunks import chunk_digest
from imagecache.collect.plan import Policy
from imagecache.collect.repack import Repacker
from imagecache.collect.run import Collector, Wishes
from imagecache.collect.work import one_by_one
from imagecache.errors import CubecacheError, NotFound
from imagecache.leases.build import BuildLease, BuildLeases, LeaseTimes
from imagecache.leases.pins import pin
from imagecache.leases.reader import Held, ReaderLease

TTL = 600
READER_TTL = 1800
GRACE = 3000.0
MIN_AGE = 2000.0
TIMES = LeaseTimes(ttl=TTL, poll=60.0, settle=5.0)
OPTIONS = "{}"


@dataclass(frozen=True)
class Recipe:
    """One image that may be built: its layers, by number, and what follows from them."""

    number: int
    layers: tuple[int, ...]

    @property
    def raw(self) -> bytes:
        return f"manifest {self.number}".encode()

    @property
    def config_raw(self) -> bytes:
        return f"config {self.number}".encode()

    @property
    def image(self) -> str:
        return "sha256:" + hashlib.sha256(self.raw).hexdigest()

    @property
    def config(self) -> str:
        return "sha256:" + hashlib.sha256(self.config_raw).hexdigest()

    @property
    def alias(self) -> AliasName:
        repository = f"example.org/app{self.number % 3}"
        return AliasName(repository, "latest", f"{repository}:latest")


RECIPES = tuple(
    Recipe(n, layers) for n, layers in enumerate(((0,), (0, 1), (0, 2), (3,), (3, 4), (0, 3, 5)))
)


def diff_id(layer: int) -> str:
    return "sha256:" + hashlib.sha256(b"layer %d" % layer).hexdigest()


def chunks_of(layer: int) -> tuple[bytes, bytes]:
    """The digests of a layer's chunks: one of its own, and one that other layers have too."""
    return chunk_digest(f"layer {layer}".encode()), chunk_digest(f"shared {layer % 2}".encode())


def image_chunks(recipe: Recipe) -> list[bytes]:
    layers = [digest for layer in recipe.layers for digest in chunks_of(layer)]
    return list(dict.fromkeys([chunk_digest(recipe.raw), *layers]))


def _blocks(digests: Iterable[bytes]) -> tuple[ChunkList, Pieces]:
    pieces = PieceBuilder()
    for digest in digests:
        pieces.chunk(digest, [(False, 1)])
    return pieces.finish()


@functools.cache
def index_of(layer: int) -> bytes:
    chunks, pieces = _blocks(chunks_of(layer))
    return LayerIndex(diff_id(layer), b"", chunks, pieces).encode()


def manifest_of(recipe: Recipe) -> bytes:
    digests = image_chunks(recipe)
    chunks, extents = _blocks(digests)
    return BlockManifest(
        face=Face.EROFS,
        options=OPTIONS,
        disk_blocks=len(digests),
        metadata_blocks=1,
        window_blocks=1,
        layers=tuple(
            PlacedLayer(chunk_digest(index_of(layer)), n, 1)
            for n, layer in enumerate(recipe.layers, 1)
        ),
        chunks=chunks,
        pieces=extents,
    ).encode()


MANIFESTS = {recipe.number: manifest_of(recipe) for recipe in RECIPES}
BLOCK_IMAGES = {n: chunk_digest(raw).hex() for n, raw in MANIFESTS.items()}
INDEX_NAMES = {
    BLOCK_IMAGES[recipe.number]: tuple(chunk_digest(index_of(n)).hex() for n in recipe.layers)
    for recipe in RECIPES
}
CHUNKS = {BLOCK_IMAGES[recipe.number]: image_chunks(recipe) for recipe in RECIPES}
Places = dict[bytes, Location]


async def put_pack(catalog: Catalog, digests: Iterable[bytes], generation: int, way: int) -> Places:
    """A pack in this simulation lists the digests of its chunks."""
    ordered = list(digests)
    body = f"way {way}\n".encode() + b"\n".join(digest.hex().encode() for digest in ordered)
    name = pack_name(chunk_digest(body), generation)
    await catalog.store.put(catalog.keys.pack(name), body)
    return {digest: Location(name, n, 1, 0, 0) for n, digest in enumerate(ordered)}


class Source:
    """A registry that has every recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    async def resolve(self, platform: Any) -> Any:
        return SimpleNamespace(digest=self.recipe.image)


class SteppedBuilder(Builder):
    """The real builder's order of things; the conversion itself is a few small objects."""

    def __init__(self, catalog: Catalog, leases: BuildLeases, dice: random.Random) -> None:
        super().__init__(catalog, None, BuildSettings(), leases)  # type: ignore[arg-type] # no spool
        self.dice = dice

    async def _build_or_meet(self, job: Any, platform: Any) -> Any:
        recipe = job.source.recipe
        met = await self.leases.meet(job.key)
        if isinstance(met, RootRecord):
            return met, None
        try:
            root = await self._convert(recipe, met)
            await met.commit(root)
        finally:
            await met.release()
        return root, BuildResult(recipe.alias.text, recipe.image, root.block_image, 1, 1)

    async def _convert(self, recipe: Recipe, lease: Any) -> RootRecord:
        catalog, generation = self.catalog, lease.generation
        known = await self._known(recipe, generation)
        places: Places = {}
        for layer in recipe.layers:
            try:
                record = await catalog.find_layer(diff_id(layer), generation)
            except NotFound:
                record = await self._layer(layer, known, generation)
            raw = await catalog.sealed("locations", bytes.fromhex(record.locations), generation)
            table = LocationTable.decode(raw)
            for n, digest in enumerate(chunks_of(layer)):
                places.setdefault(digest, table.locate(n))
            if self.dice.random() < 0.3:
                await lease.renew()
        places |= await self._pack([chunk_digest(recipe.raw)], generation)
        located = LocationTable.build(
            bytes.fromhex(BLOCK_IMAGES[recipe.number]), map(places.get, image_chunks(recipe))
        )
        manifest, _ = await catalog.put_sealed("manifests", MANIFESTS[recipe.number], generation)
        where, _ = await catalog.put_sealed("locations", located.encode(), generation)
        await catalog.put_blob(recipe.image, recipe.raw, generation)
        await catalog.put_blob(recipe.config, recipe.config_raw, generation)
        return RootRecord(
            realm=catalog.keys.realm,
            generation=generation,
            image=recipe.image,
            face="erofs",
            options=OPTIONS,
            format_version=1,
            platform="linux/amd64",
            config=recipe.config,
            block_image=manifest.hex(),
            locations=where.hex(),
            layers=tuple(diff_id(layer) for layer in recipe.layers),
            packs=tuple(pack.hex() for pack in located.packs),
            size_bytes=4096,
            chunks=1,
            packed_bytes=1,
        )

    async def _known(self, recipe: Recipe, generation: int) -> Places:
        """Places of an earlier image of the repository, in this generation."""
        for record in await self.catalog.aliases(recipe.alias.repository):
            key = ImageKey(record.image, Face.EROFS, OPTIONS)
            with contextlib.suppress(NotFound):
                root = await self.catalog.root_in(key, generation)
                table = await self.catalog.location_table(root)
                return {x: table.locate(n) for n, x in enumerate(CHUNKS[root.block_image])}
        return {}

    async def _layer(self, layer: int, known: Places, generation: int) -> LayerRecord:
        own, shared = chunks_of(layer)
        if shared in known and self.dice.random() < 0.7:
            places = await self._pack([own], generation) | {shared: known[shared]}
        else:
            places = await self._pack([own, shared], generation)
        index, _ = await self.catalog.put_sealed("indexes", index_of(layer), generation)
        table = LocationTable.build(chunk_digest(index_of(layer)), (places[own], places[shared]))
        where, _ = await self.catalog.put_sealed("locations", table.encode(), generation)
        packs = tuple(pack.hex() for pack in table.packs)
        record = LayerRecord(diff_id(layer), index.hex(), where.hex(), packs)
        await self.catalog.put_layer(record, generation)
        return record

    async def _pack(self, digests: list[bytes], generation: int) -> Places:
        return await put_pack(self.catalog, digests, generation, self.dice.randrange(2))


class SteppedRepacker(Repacker):
    """The real re-packing but for the copying of bytes, which needs threads and files."""

    def __init__(self, catalog: Catalog, leases: BuildLeases, dice: random.Random) -> None:
        salt = dice.randrange(256)
        super().__init__(
            catalog,
            None,  # type: ignore[arg-type] # packs are read from the store
            scratch=Path("unused"),
            wanted=lambda place: bool((place.pack[9] ^ salt) % 3),
            leases=leases,
        )
        self._dice = dice

    async def _clear(self) -> None:
        pass

    @contextlib.asynccontextmanager
    async def _hold(self, lease: BuildLease) -> AsyncIterator[None]:
        try:
            yield
        finally:
            with contextlib.suppress(CubecacheError):
                await lease.release()

    async def _move(self, chunks: dict[bytes, tuple[Location, int]]) -> None:
        catalog = self._catalog
        for digest, (place, _) in chunks.items():
            body = await catalog.store.get(catalog.keys.pack(place.pack), limit=1 << 20)
            if digest.hex().encode() not in body:
                raise Violation("a re-packer reads a chunk where it is not")
        order = list(chunks)
        half = self._dice.randrange(len(order)) if self._dice.random() < 0.5 else 0
        for part in (order[:half], order[half:]):
            if part:
                way = self._dice.randrange(2, 1 << 30)
                self._moved |= await put_pack(catalog, part, self._generation, way)


class Life:
    """What an actor does, again and again."""

    def __init__(self, world: World, actor: Actor, dice: random.Random) -> None:
        self.world = world
        self.actor = actor
        self.dice = dice
        self.catalog = Catalog(StepStore(world, actor), "sim")  # type: ignore[arg-type] # bytes only

    async def forever(self, once: Callable[[], Coroutine[Any, Any, None]], rest: float) -> None:
        while True:
            with contextlib.suppress(CubecacheError):
                await once()
            await self.actor.sleep(self.dice.expovariate(1 / rest))

    async def builder(self) -> None:
        leases = BuildLeases(
            self.catalog, holder=self.actor.name, times=TIMES, sleep=self.actor.sleep
        )
        builder = SteppedBuilder(self.catalog, leases, self.dice)

        async def once() -> None:
            recipe = self.dice.choice(RECIPES)
            await builder.build(
                Source(recipe),  # type: ignore[arg-type] # never asked for blobs
                None,  # type: ignore[arg-type] # as above
                face=Face.EROFS,
                options=OPTIONS,
                alias=recipe.alias,
                report=lambda _: None,
            )
            where = self.catalog.keys.alias(recipe.alias.repository, recipe.alias.tag)
            raw = self.world.objects.get(where)
            if raw is not None and recipe.image.encode() in raw[0]:
                self.world.promise(where, Firm(recipe.image, (), None))

        await self.forever(once, 900.0)

    async def collector(self) -> None:
        wishes = Wishes(Policy(MIN_AGE, GRACE, 0.2), delete_many=True)

        async def once() -> None:
            await Collector(
                self.catalog,
                wishes,
                wall=lambda: self.world.now + self.dice.uniform(-100, 100),
                for_each=one_by_one,
                holder=f"{self.actor.name}.{self.dice.randrange(1 << 30)}",
            ).run()

        await self.forever(once, 600.0)

    async def repacker(self) -> None:
        leases = BuildLeases(
            self.catalog, holder=self.actor.name, times=TIMES, sleep=self.actor.sleep
        )

        async def once() -> None:
            report = await SteppedRepacker(self.catalog, leases, self.dice).run()
            self.world.repacked += len(report.images)

        await self.forever(once, 1800.0)

    async def reader(self) -> None:
        me = f"read {self.actor.name}"

        async def resolve(lease: ReaderLease, image: str) -> RootRecord | None:
            for _ in range(4):
                root = await self.catalog.find_root(ImageKey(image, Face.EROFS, OPTIONS))
                if not await lease.hold([Held(image, root.generation, root.packs)]):
                    written = self.world.objects[self.catalog.keys.reader_lease(self.actor.name)][1]
                    if written + READER_TTL > self.world.now:
                        self.world.promise(me, Firm(image, root.packs, written + READER_TTL))
                    return root
            return None

        async def once() -> None:
            lease = ReaderLease(self.catalog, holder=self.actor.name, ttl_seconds=READER_TTL)
            image = self.dice.choice(RECIPES).image
            try:
                root = await resolve(lease, image)
                while root is not None and self.dice.random() < 0.9:
                    await self.actor.sleep(READER_TTL / 3)
                    self.world.take_back(me)
                    root = await resolve(lease, image)
            finally:
                self.world.take_back(me)
                if not self.actor.dead:
                    await lease.hold([])

        await self.forever(once, 900.0)

    async def owner(self) -> None:
        """Drops names, pins and unpins images."""

        async def once() -> None:
            recipe = self.dice.choice(RECIPES)
            choice = self.dice.random()
            where = self.catalog.keys.pin(recipe.image)
            if choice < 0.4:
                self.world.take_back(
                    self.catalog.keys.alias(recipe.alias.repository, recipe.alias.tag)
                )
                with contextlib.suppress(NotFound):
                    await self.catalog.drop_alias(await self.catalog.alias(recipe.alias))
            elif choice < 0.8:
                root = await self.catalog.find_root(ImageKey(recipe.image, Face.EROFS, OPTIONS))
                ttl = self.dice.choice((1000, 8000))
                self.world.take_back(where)
                await pin(self.catalog, root, "a pin", ttl)
                if where in self.world.objects:
                    until = self.world.objects[where][1] + ttl
                    if until > self.world.now:
                        self.world.promise(where, Firm(recipe.image, (), until))
            else:
                self.world.take_back(where)
                await self.catalog.store.delete(where)

        await self.forever(once, 1200.0)


__all__ = ["RECIPES", "Life", "Path", "State", "pack_generation"]
