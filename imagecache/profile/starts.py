"""Where profiles and boot packs stand in a store, and which of them an image's start is given."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from imagecache.blockimage.envelope import HEADER, seal, unseal
from imagecache.blockimage.records import MAX_RECORD, StartRecord
from imagecache.catalog import Catalog
from imagecache.errors import Corrupt, NotFound, Unsupported
from imagecache.profile import boot, codec
from imagecache.profile.boot import BootTable
from imagecache.profile.profile import Profile
from imagecache.store.base import ObjectStat

log = logging.getLogger(__name__)

GetSealed = Callable[[str, bytes, int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class KnownStart:
    """What the store knows of a start, in one generation; `own` where it is of this very image."""

    record: StartRecord
    generation: int
    profile: Profile
    boot: BootTable | None
    own: bool


class Starts:
    """The start records of one realm, with the objects that they name."""

    def __init__(self, catalog: Catalog, get_sealed: GetSealed | None = None) -> None:
        """`get_sealed` may answer from a cache: (key, name, limit) -> verified plaintext."""
        self._catalog = catalog
        self._store = catalog.store
        self._keys = catalog.keys
        self._get_sealed = get_sealed or self._from_store

    async def _from_store(self, key: str, name: bytes, limit: int) -> bytes:
        return unseal(await self._store.get(key, limit=limit + HEADER.size), name, limit=limit)

    async def find(
        self, repository: str, image: str, *, likely: int | None = None
    ) -> KnownStart | None:
        """The image's own start, else the repository's newest other; None where there is neither.

        `likely` is the generation to look into before the others are even listed. Raises
        Unavailable or Denied where the store cannot be asked. What is damaged, or of a newer
        version, counts as absent.
        """
        if likely is not None:
            known = await self._known(self._keys.start(repository, image, likely), likely)
            if known is not None:
                return known
        generations = await self._catalog.readable_generations()
        for generation in generations:
            known = await self._known(self._keys.start(repository, image, generation), generation)
            if known is not None:
                return known
        for generation in generations:
            for stat in await self._newest_first(repository, generation):
                known = await self._known(stat.key, generation, own=False)
                if known is not None:
                    return known
        return None

    async def own(self, repository: str, image: str) -> KnownStart:
        """The image's own start; NotFound."""
        known = await self.find(repository, image)
        if known is None or not known.own:
            raise NotFound(
                f"nothing is recorded of the start of {image}",
                remedy="cubecache profile record EXPORT, or cubecache profile build IMAGE",
            )
        return known

    async def _newest_first(self, repository: str, generation: int) -> list[ObjectStat]:
        prefix = self._keys.starts_of(repository, generation)
        found = [stat async for stat in self._store.list(prefix)]
        return sorted(found, key=lambda stat: (stat.modified, stat.key), reverse=True)[:4]

    async def _known(self, key: str, generation: int, *, own: bool = True) -> KnownStart | None:
        try:
            record = StartRecord.decode(await self._store.get(key, limit=MAX_RECORD))
            name = bytes.fromhex(record.profile)
            where = self._keys.profile(name, generation)
            raw, table = await asyncio.gather(
                self._get_sealed(where, name, codec.MAX_ENCODED), self._boot(record, generation)
            )
            profile = codec.decode_profile(raw)
        except NotFound:
            return None
        except (Corrupt, Unsupported) as error:
            log.warning("start record %s is not usable: %s", key, error)
            return None
        return KnownStart(record, generation, profile, table, own)

    async def _boot(self, record: StartRecord, generation: int) -> BootTable | None:
        if not record.boot_table:
            return None
        name = bytes.fromhex(record.boot_table)
        try:
            where = self._keys.boot_table(name, generation)
            return BootTable.decode(await self._get_sealed(where, name, boot.MAX_ENCODED))
        except (NotFound, Corrupt, Unsupported) as error:
            log.warning("the boot table of %s is not usable: %s", record.image, error)
            return None

    @staticmethod
    def name_of(profile: Profile) -> bytes:
        """The name under which a profile is stored."""
        return seal(codec.encode_profile(profile))[0]

    async def save(
        self, repository: str, profile: Profile, table: BootTable | None, generation: int
    ) -> StartRecord:
        """Stores a profile, and the table of a boot pack that is stored already.

        The record that points to them is written last: from then on exports use them.
        """
        name, sealed = seal(codec.encode_profile(profile))
        await self._store.put(self._keys.profile(name, generation), sealed)
        table_name = b""
        if table is not None:
            table_name, sealed = seal(table.encode())
            await self._store.put(self._keys.boot_table(table_name, generation), sealed)
        record = StartRecord(
            repository=repository,
            image=profile.image,
            block_image=profile.block_image.hex(),
            profile=name.hex(),
            boot_table=table_name.hex(),
            sources=profile.sources,
        )
        key = self._keys.start(repository, profile.image, generation)
        await self._store.put(key, record.encode())
        return record
