"""A sealed realm's whole life: damage, repair, rotation, collection, and the wrong secrets."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from kits.realm import FAST, build, write_images

from imagecache.accounting import Accountant
from imagecache.blockimage.keys import RealmKeys
from imagecache.blockimage.manifest import Face, canonical_options
from imagecache.blockimage.records import AliasRecord
from imagecache.blockimage.seals import NO_SEALS, Seals, Secrets
from imagecache.catalog import Catalog
from imagecache.collect.plan import Policy
from imagecache.collect.run import Collector, Wishes
from imagecache.errors import Denied
from imagecache.leases.build import BuildLeases
from imagecache.repair.presence import PresenceCheck
from imagecache.repair.repairer import Broken, Repairer, RepairReport
from imagecache.repair.scrub import Scrubber, ScrubReport, ScrubWishes
from imagecache.resealing import reseal
from imagecache.sealedwith import count_key_ids
from imagecache.store.memory import MemoryReader, MemoryStore
from imagecache.store.sealed import SealedStore
from imagecache.verify import Verifier

SECRETS = Secrets.parse(f"names:{'0a' * 32} 1:{'0b' * 32}")
ROTATED = SECRETS.with_new(b"n" * 32, active=True)
KEYS = RealmKeys("default")


class Realm:
    """A memory store seen with some secrets."""

    def __init__(self, inner: MemoryStore, spool: Path, secrets: Secrets | None = SECRETS) -> None:
        self.inner = inner
        self.spool = spool
        self.seals = Seals(secrets) if secrets is not None else NO_SEALS
        self.store = SealedStore(inner, KEYS, self.seals) if secrets is not None else inner
        self.catalog = Catalog(self.store, "default", self.seals)
        self.reader = MemoryReader(inner)

    async def build(self, reference: str) -> str:
        return (await build(self.store, self.spool, reference, seals=self.seals)).block_image

    async def scrub(self) -> ScrubReport:
        wishes = ScrubWishes(from_start=True)
        return await Scrubber(self.catalog, self.reader, wishes).run()

    async def repair(self) -> RepairReport:
        async def rebuild(name: AliasRecord, found: Broken) -> str:
            result = await build(
                self.store, self.spool, name.name, seals=self.seals, distrusted=found.packs
            )
            return result.block_image

        faces = [(Face.EROFS, canonical_options({}))]
        return await Repairer(self.catalog, self.reader, rebuild, faces=faces).run()

    async def faults(self) -> tuple[int, list[str]]:
        """How many images are shown, and everything that is not whole about them."""
        check, images, faults = PresenceCheck(self.catalog, self.reader), 0, []
        async for root in self.catalog.roots():
            images += 1
            faults += [found.what for found in await check.check(root)]
            manifest = await self.catalog.block_manifest(root)
            table = await self.catalog.location_table(root)
            verifier = Verifier(self.catalog, self.reader, manifest, table)
            faults += (await verifier.run(lambda _: None)).damaged
        return images, faults


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
async def realm(images: list[str], tmp_path: Path) -> Realm:
    realm = Realm(MemoryStore(), tmp_path / "spool")
    for reference in images:
        await realm.build(reference)
    return realm


async def test_identity_is_the_plaintexts(realm: Realm, images: list[str], tmp_path: Path) -> None:
    """Sealed or not, the block image is the same; the stored packs are not."""
    plain = Realm(MemoryStore(), tmp_path / "plain", None)
    digests = {await plain.build(reference) for reference in images}
    assert {root.block_image async for root in realm.catalog.roots()} == digests
    packs = {key for key in plain.inner.objects if "/packs/" in key}
    assert not packs & set(realm.inner.objects)
    assert await realm.faults() == (2, [])


def flip(body: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(body))
    return body[:at] + bytes([body[at] ^ (1 << dice.randrange(8))]) + body[at + 1 :]


def cut(body: bytes, dice: random.Random) -> bytes:
    return body[: dice.randrange(len(body))]


@pytest.mark.parametrize("hurt", [flip, cut, lambda body, dice: b""], ids=["flip", "cut", "empty"])
async def test_damage_is_found_unserved_and_repaired(
    realm: Realm, hurt: Callable[[bytes, random.Random], bytes]
) -> None:
    """G12 in a sealed realm: packs heal byte by byte, as sealing is deterministic."""
    dice = random.Random(7)
    whole = dict(realm.inner.objects)
    kinds = ("/packs/", "/roots/", "/manifests/", "/locations/", "/indexes/", "/blobs/")
    hit = []
    for kind in kinds:
        key = dice.choice(sorted(key for key in whole if kind in key))
        realm.inner.objects[key] = hurt(whole[key], dice)
        hit.append(key)
    assert len((await realm.scrub()).damage) >= len(hit)
    for _ in range(2):
        assert not (await realm.repair()).failed
    assert await realm.faults() == (2, [])
    packs = {key: body for key, body in whole.items() if "/packs/" in key}
    assert all(realm.inner.objects[key] == body for key, body in packs.items())


async def test_a_chunk_from_another_place_of_the_pack_is_not_shown(realm: Realm) -> None:
    """Moved ciphertext of the right length is as wrong as a flipped bit."""
    root = await anext(aiter(realm.catalog.roots()))
    table = await realm.catalog.location_table(root)
    places = [table.locate(ordinal) for ordinal in range(len(table))]
    one, two = next(
        (a, b)
        for a in places
        for b in places
        if a.pack == b.pack and a.offset < b.offset and a.stored_length == b.stored_length
    )
    key = KEYS.pack(one.pack)
    body = bytearray(realm.inner.objects[key])
    size = one.stored_length
    moved = bytes(body[two.offset : two.offset + size])
    body[one.offset : one.offset + size] = moved
    realm.inner.objects[key] = bytes(body)
    _, faults = await realm.faults()
    assert faults
    (found,) = [x for x in (await realm.scrub()).damage if x.key == key]
    assert found.chunks


async def test_collection_keeps_what_is_named_sealed_and_whole(realm: Realm) -> None:
    """Copies into a new generation are sealed under their new names."""
    name = (await realm.catalog.aliases())[0]
    await realm.catalog.drop_alias(name)
    before = sum(map(len, realm.inner.objects.values()))
    for _ in range(8):
        await Collector(realm.catalog, Wishes(Policy(0, 0), delete_many=True)).run()
    assert await realm.faults() == (1, [])
    assert sum(map(len, realm.inner.objects.values())) < before * 0.8
    assert not any("/g00000001/" in key for key in realm.inner.objects)
    assert (await Accountant(realm.catalog).account()).objects == len(realm.inner.objects) - 1


async def test_rotation(realm: Realm, images: list[str], tmp_path: Path) -> None:
    """The new secret seals what is new, the old one goes on opening, and the count tells."""
    rotated = Realm(realm.inner, tmp_path / "spool", ROTATED)
    assert await rotated.faults() == (2, [])
    before = await count_key_ids(rotated.catalog)
    assert set(before) == {0, 1}
    (third,) = write_images(tmp_path / "third", 3)[2:]
    await rotated.build(third)
    assert await rotated.faults() == (3, [])
    after = await count_key_ids(rotated.catalog)
    assert after[1][1] >= before[1][1] // 2  # shared chunks stay where they are
    assert after[2][1] > 0
    with pytest.raises(Denied, match="secret 2"):
        await realm.faults()  # a host that was not given the new secret says so


@pytest.mark.parametrize("secrets", [None, Secrets.parse(f"names:{'0a' * 32} 1:{'0d' * 32}")])
async def test_the_wrong_or_no_secrets_change_nothing(
    realm: Realm, images: list[str], tmp_path: Path, secrets: Secrets | None
) -> None:
    """A missing setting is said in words: it is neither an empty realm nor damage."""
    before = dict(realm.inner.objects)
    stranger = Realm(realm.inner, tmp_path / "spool", secrets)
    collector = Collector(stranger.catalog, Wishes(Policy(0, 0), delete_many=True))
    for call in (
        stranger.faults(), stranger.scrub(), stranger.repair(), stranger.build(images[0]),
        collector.run(), stranger.catalog.aliases(), Accountant(stranger.catalog).account(),
    ):  # fmt: skip
        with pytest.raises(Denied, match="secret"):
            await call
    clock = KEYS.clock
    realm.inner.objects.pop(clock, None)
    before.pop(clock, None)
    assert realm.inner.objects == before


async def test_a_rotation_ends_without_the_registry(
    realm: Realm, images: list[str], tmp_path: Path
) -> None:
    """Resealed and collected, the realm needs the new secret alone; no identity has changed."""
    before = {root.block_image async for root in realm.catalog.roots()}
    rotated = Realm(realm.inner, tmp_path / "spool", ROTATED)
    leases = BuildLeases(rotated.catalog, times=FAST)
    report = await reseal(rotated.catalog, rotated.reader, scratch=tmp_path / "s", leases=leases)
    assert (len(report.images), report.left, report.failed) == (2, [], {})
    assert report.records == 2  # two names
    assert await rotated.faults() == (2, [])
    assert (await count_key_ids(rotated.catalog))[1][1] == 0
    again = await reseal(rotated.catalog, rotated.reader, scratch=tmp_path / "s", leases=leases)
    assert (again.chunks, again.packs, again.records) == (0, 0, 0)
    # what the old secret still seals is garbage; a dropped name makes collections begin
    await rotated.build(write_images(tmp_path / "third", 3)[2])
    third = next(x for x in await rotated.catalog.aliases() if "third" in x.name)
    await rotated.catalog.drop_alias(third)
    for _ in range(8):
        await Collector(rotated.catalog, Wishes(Policy(0, 0), delete_many=True)).run()
    assert 1 not in await count_key_ids(rotated.catalog)
    only = Secrets(SECRETS.names, {2: b"n" * 32}, 2)
    alone = Realm(realm.inner, tmp_path / "spool", only)
    assert await alone.faults() == (2, [])
    assert {root.block_image async for root in alone.catalog.roots()} == before
    assert not (await alone.scrub()).damage
