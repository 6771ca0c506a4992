"""Small real images in a memory store, and stores that break at a chosen call."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imagemaker.entries import Entry, directory
from kits.image import write_image

from imagecache.blockimage.manifest import Face, canonical_options
from imagecache.blockimage.seals import NO_SEALS, Seals
from imagecache.build.pipeline import Builder, BuildSettings
from imagecache.build.progress import BuildResult
from imagecache.build.spool import Spool
from imagecache.catalog import Catalog
from imagecache.composition import alias_name
from imagecache.leases.build import BuildLeases, LeaseTimes
from imagecache.oci.platform import host_platform
from imagecache.oci.reference import parse_reference
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.source import open_source
from imagecache.repair.presence import PresenceCheck
from imagecache.store.base import ObjectStat, Store
from imagecache.store.memory import MemoryReader, MemoryStore
from imagecache.verify import Verifier

FAST = LeaseTimes(ttl=600, poll=0.05, settle=0.01)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def layer(seed: int, files: int = 8) -> list[Entry]:
    folder = f"d{seed}"
    return [
        directory(folder),
        *(Entry(f"{folder}/f{n}", content=noise(seed * 100 + n, 40_000)) for n in range(files)),
    ]


def write_images(root: Path, count: int = 2) -> list[str]:
    """Images that share a base layer, each with one of its own."""
    return [write_image(root / f"image{n}", [layer(1), layer(2 + n)]) for n in range(count)]


class Crash(BaseException):
    """The process ends here."""


@dataclass
class CrashStore:
    """A store whose process dies at the n-th write or delete, before it or after it."""

    inner: Store
    at: int = 1 << 30
    after: bool = False
    writes: int = 0
    keys: list[str] = field(default_factory=list)

    async def _around(self, key: str, work) -> object:
        self.writes += 1
        self.keys.append(key)
        if self.writes > self.at or (self.writes == self.at and not self.after):
            raise Crash
        answer = await work
        if self.writes == self.at:
            raise Crash
        return answer

    async def put(self, key: str, body: bytes | Path, *, only_if_absent: bool = False) -> bool:
        work = self.inner.put(key, body, only_if_absent=only_if_absent)
        try:
            return bool(await self._around(key, work))
        finally:
            work.close()

    async def delete(self, key: str) -> None:
        work = self.inner.delete(key)
        try:
            await self._around(key, work)
        finally:
            work.close()

    async def get(self, key: str, *, limit: int) -> bytes:
        return await self.inner.get(key, limit=limit)

    async def stat(self, key: str) -> ObjectStat:
        return await self.inner.stat(key)

    async def list(self, prefix: str) -> AsyncIterator[ObjectStat]:
        async for stat in self.inner.list(prefix):
            yield stat

    async def claims_are_atomic(self) -> bool:
        return True

    async def close(self) -> None:
        pass


async def build(
    store: Store,
    spool: Path,
    reference: str,
    realm: str = "default",
    *,
    seals: Seals = NO_SEALS,
    distrusted: frozenset[str] | None = None,
) -> BuildResult:
    catalog = Catalog(store, realm, seals)
    parsed = parse_reference(reference)
    source = open_source(parsed, RegistrySettings())
    try:
        return await Builder(
            catalog, Spool(spool), BuildSettings(), BuildLeases(catalog, times=FAST)
        ).build(
            source,
            host_platform(),
            face=Face.EROFS,
            options=canonical_options({}),
            alias=alias_name(parsed),
            report=lambda _: None,
            distrusted=distrusted,
        )
    finally:
        await source.close()


def built_realm(root: Path, references: Sequence[str]) -> MemoryStore:
    store = MemoryStore()

    async def run() -> None:
        for reference in references:
            await build(store, root / "spool", reference)

    asyncio.run(run())
    return store


def copied(store: MemoryStore) -> MemoryStore:
    other = MemoryStore()
    other.objects = dict(store.objects)
    other._modified = dict(store._modified)
    return other


async def broken(store: MemoryStore, realm: str = "default") -> tuple[int, list[str]]:
    """How many images the realm shows, and everything about them that is not whole."""
    catalog, reader = Catalog(store, realm), MemoryReader(store)
    check = PresenceCheck(catalog, reader)
    images, faults = 0, []
    async for root in catalog.roots():
        images += 1
        damage = await check.check(root)
        faults += [f"{found.key}: {found.what}" for found in damage]
        if not damage:
            manifest = await catalog.block_manifest(root)
            for placed in manifest.layers:
                await catalog.layer_index(placed.index, root.generation)
            table = await catalog.location_table(root)
            report = await Verifier(catalog, reader, manifest, table).run(lambda _: None)
            faults += report.damaged
    return images, faults
