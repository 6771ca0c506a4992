"""The catalog: what a realm of a store holds, by name, by image and by layer.

It reads and writes the small records and sealed objects. Generations, roots and aliases are read
here and nowhere else, so that "not there" and "could not ask" stay apart for every caller.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from imagecache.blockimage.envelope import MAX_PLAINTEXT, seal, unseal
from imagecache.blockimage.generations import Generation, State, parse_generations
from imagecache.blockimage.keys import ImageKey, RealmKeys, SealedKind
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest, Face
from imagecache.blockimage.records import (
    MAX_RECORD,
    AliasRecord,
    GenerationRecord,
    LayerRecord,
    RootRecord,
)
from imagecache.blockimage.seals import NO_SEALS, Seals
from imagecache.errors import Corrupt, LimitExceeded, NotFound, Unsupported, UsageError
from imagecache.store.base import Store

log = logging.getLogger(__name__)

_DAMAGED = (Corrupt, LimitExceeded, Unsupported)


@dataclass(frozen=True, slots=True)
class AliasName:
    """A reference split where an alias is split: `tag` is a tag, or `@` and a digest."""

    repository: str
    tag: str
    text: str


def key_of(root: RootRecord) -> ImageKey:
    """The key under which a root must stand."""
    return ImageKey(root.image, Face.parse(root.face), root.options, root.format_version)


class Catalog:
    """One realm of one store."""

    def __init__(self, store: Store, realm: str, seals: Seals = NO_SEALS) -> None:
        """`seals` opens the realm's chunks; its small objects are sealed by `store` itself."""
        self.store = store
        self.keys = RealmKeys(realm)
        self.seals = seals

    async def generations(self) -> list[Generation]:
        """Every generation with its state, by number."""
        prefix = self.keys.generations
        found = [(stat.key, stat.modified) async for stat in self.store.list(prefix)]
        return parse_generations(prefix, found)

    async def mark(self, number: int, state: State) -> None:
        """Moves a generation forward; an earlier state than the one it has changes nothing."""
        record = GenerationRecord(number, state.word)
        await self.store.put(
            self.keys.generation(number, state), record.encode(), only_if_absent=True
        )

    async def active_generation(self) -> int:
        """The generation that new objects go into; the first is opened on first use."""
        while True:
            known = await self.generations()
            active = [each.number for each in known if each.state is State.ACTIVE]
            if active:
                return max(active)
            number = max((each.number for each in known), default=0) + 1
            await self.mark(number, State.ACTIVE)

    async def state_of(self, number: int) -> State:
        """The state of one generation; DELETED for one that nobody knows."""
        for generation in await self.generations():
            if generation.number == number:
                return generation.state
        return State.DELETED

    async def readable_generations(self) -> list[int]:
        """Generations that may be read from, newest first."""
        known = await self.generations()
        return [generation.number for generation in reversed(known) if generation.readable]

    async def find_root(self, key: ImageKey) -> RootRecord:
        """The newest readable root of an image; NotFound where there is none."""
        for generation in await self.readable_generations():
            try:
                return await self.root_in(key, generation)
            except NotFound:
                continue
        raise NotFound(
            f"image {key.image} is not in realm {self.keys.realm}",
            remedy="cubecache preload IMAGE",
        )

    async def root_in(self, key: ImageKey, generation: int) -> RootRecord:
        """The root of an image in one generation."""
        name = self.keys.root(key, generation)
        return self._own(RootRecord.decode(await self.store.get(name, limit=MAX_RECORD)), name)

    def _own(self, root: RootRecord, name: str) -> RootRecord:
        """That root, if it is the one that lies under this name."""
        if root.realm != self.keys.realm:
            raise Corrupt(f"a root of realm {root.realm} lies in realm {self.keys.realm}")
        if not name.endswith(f"/{key_of(root).digest()}.json"):
            raise Corrupt(f"{name} is the root of another image: {root.image}")
        return root

    async def commit(self, key: ImageKey, root: RootRecord) -> None:
        """Writes the root record: from here on the image exists."""
        await self.store.put(self.keys.root(key, root.generation), root.encode())

    async def roots(self) -> AsyncIterator[RootRecord]:
        """Every root that can be read; an image in two generations comes once, from the newer.

        A damaged record is logged and passed over: what lists or serves images loses one image,
        and collection, which must not, reads roots by itself (`imagecache.collect.snapshot`).
        """
        seen: set[str] = set()
        for generation in await self.readable_generations():
            async for stat in self.store.list(self.keys.roots(generation)):
                name = stat.key.rsplit("/", 1)[1]
                if name in seen:
                    continue
                try:
                    raw = await self.store.get(stat.key, limit=MAX_RECORD)
                    root = self._own(RootRecord.decode(raw), stat.key)
                except NotFound:
                    continue  # collected since it was listed
                except _DAMAGED as error:
                    log.warning("%s is passed over: %s (cubecache repair)", stat.key, error)
                    continue
                seen.add(name)
                yield root

    async def find_layer(self, diff_id: str, generation: int) -> LayerRecord:
        """The converted layer of a diff id in one generation."""
        key = self.keys.layer(diff_id, generation)
        record = LayerRecord.decode(await self.store.get(key, limit=MAX_RECORD))
        if record.diff_id != diff_id:
            raise Corrupt(f"{key} is the record of another layer: {record.diff_id}")
        return record

    async def put_layer(self, record: LayerRecord, generation: int) -> None:
        """Makes a converted layer findable."""
        await self.store.put(self.keys.layer(record.diff_id, generation), record.encode())

    async def alias(self, name: AliasName) -> AliasRecord:
        """The image that a name stands for."""
        try:
            raw = await self.store.get(self.keys.alias(name.repository, name.tag), limit=MAX_RECORD)
        except NotFound:
            await self.generations()  # in a sealed realm names are others: that is said instead
            raise
        record = AliasRecord.decode(raw)
        if (record.repository, record.tag) != (name.repository, name.tag):
            raise Corrupt(f"the record of {name.text} is that of another name: {record.name}")
        return record

    async def put_alias(self, name: AliasName, image: str) -> None:
        """Points a name at an image."""
        record = AliasRecord(name.repository, name.tag, name.text, image)
        await self.store.put(self.keys.alias(name.repository, name.tag), record.encode())

    async def drop_alias(self, record: AliasRecord) -> None:
        """Removes a name; the image's objects stay until collection."""
        await self.store.delete(self.keys.alias(record.repository, record.tag))

    async def aliases(self, repository: str | None = None) -> list[AliasRecord]:
        """All names that can be read, or those of one repository, by name; damage as in `roots`."""
        prefix = self.keys.aliases if repository is None else self.keys.aliases_of(repository)
        records = []
        async for stat in self.store.list(prefix):
            try:
                raw = await self.store.get(stat.key, limit=MAX_RECORD)
                records.append(AliasRecord.decode(raw))
            except NotFound:
                continue  # dropped since it was listed
            except _DAMAGED as error:
                log.warning("%s is passed over: %s (cubecache repair)", stat.key, error)
        return sorted(records, key=lambda record: record.name)

    async def resolve_name(self, name: AliasName | str) -> str:
        """The manifest digest behind a name, a digest, or a unique start of one (8+ hex digits)."""
        if isinstance(name, AliasName):
            return (await self.alias(name)).image
        wanted = name.removeprefix("sha256:")
        found = set()
        async for root in self.roots():
            if root.image.partition(":")[2].startswith(wanted):
                found.add(root.image)
        if len(found) > 1:
            raise UsageError(f"{name} names {len(found)} images", remedy="give more digits")
        if not found:
            raise NotFound(f"no image {name} in realm {self.keys.realm}", remedy="cubecache images")
        return found.pop()

    async def put_sealed(
        self, kind: SealedKind, plaintext: bytes, generation: int
    ) -> tuple[bytes, int]:
        """Stores a layer index, manifest or location table; its name and stored bytes."""
        name, sealed = seal(plaintext)
        await self.store.put(self.keys.sealed(kind, name, generation), sealed)
        return name, len(sealed)

    async def sealed(self, kind: SealedKind, name: bytes, generation: int) -> bytes:
        """The verified plaintext of a sealed object."""
        key = self.keys.sealed(kind, name, generation)
        return unseal(await self.store.get(key, limit=MAX_PLAINTEXT), name)

    async def layer_index(self, name: bytes, generation: int) -> LayerIndex:
        """A layer index."""
        return LayerIndex.decode(await self.sealed("indexes", name, generation))

    async def block_manifest(self, root: RootRecord) -> BlockManifest:
        """The block manifest of a root."""
        name = bytes.fromhex(root.block_image)
        return BlockManifest.decode(await self.sealed("manifests", name, root.generation))

    async def location_table(self, root: RootRecord) -> LocationTable:
        """The location table of a root."""
        name = bytes.fromhex(root.locations)
        return LocationTable.decode(await self.sealed("locations", name, root.generation))

    async def put_blob(self, digest: str, raw: bytes, generation: int) -> None:
        """Keeps an OCI manifest or config as the registry had it."""
        await self.store.put(self.keys.blob(digest, generation), raw)

    async def blob(self, digest: str, generation: int) -> bytes:
        """An OCI manifest or config; Corrupt where it does not match its digest."""
        raw = await self.store.get(self.keys.blob(digest, generation), limit=MAX_RECORD)
        self.check_blob(digest, raw)
        return raw

    @staticmethod
    def check_blob(digest: str, raw: bytes) -> None:
        """Corrupt unless these are the bytes of an OCI digest."""
        algorithm, _, wanted = digest.partition(":")
        if algorithm not in ("sha256", "sha512"):
            raise Corrupt(f"{digest} is no digest of a blob")
        if hashlib.new(algorithm, raw).hexdigest() != wanted:
            raise Corrupt(f"the stored blob {digest} does not match its digest")
