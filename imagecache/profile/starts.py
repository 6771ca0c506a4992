"""Where profiles and boot packs stand in a store, and which of them an image's start is given."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from imagecache.blockimage.envelope import HEADER, seal, unseal
from imagecache.blockimage.keys import RealmKeys
from imagecache.blockimage.records import MAX_RECORD, StartRecord
from imagecache.errors import Corrupt, NotFound, Unsupported
from imagecache.profile import boot, codec
from imagecache.profile.boot import BootTable
from imagecache.profile.profile import Profile
from imagecache.store.base import ObjectStat, Store

log = logging.getLogger(__name__)

GetSealed = Callable[[str, bytes, int], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class KnownStart:
    """What the store knows of a start; `own` where it is of this very image."""

    record: StartRecord
    profile: Profile
    boot: BootTable | None
    own: bool


class Starts:
    """The start records of one realm, with the objects that they name."""

    def __init__(self, store: Store, keys: RealmKeys, get_sealed: GetSealed | None = None) -> None:
        """`get_sealed` may answer from a cache: (key, name, limit) -> verified plaintext."""
        self._store = store
        self._keys = keys
        self._get_sealed = get_sealed or self._from_store

    async def _from_store(self, key: str, name: bytes, limit: int) -> bytes:
        return unseal(await self._store.get(key, limit=limit + HEADER.size), name, limit=limit)

    async def find(self, repository: str, image: str) -> KnownStart | None:
        """The image's own start, else the repository's newest other; None where there is neither.

        Raises Unavailable or Denied where the store cannot be asked. What is damaged, or of a newer
        version, counts as absent.
        """
        record = await self._record(self._keys.start(repository, image))
        own = record is not None
        if record is None:
            for stat in await self._newest_first(repository):
                record = await self._record(stat.key)
                if record is not None:
                    break
        return None if record is None else await self._load(record, own=own)

    async def own(self, repository: str, image: str) -> KnownStart:
        """The image's own start; NotFound."""
        record = await self._record(self._keys.start(repository, image))
        known = None if record is None else await self._load(record, own=True)
        if known is None:
            raise NotFound(
                f"nothing is recorded of the start of {image}",
                remedy="cubecache profile record EXPORT, or cubecache profile build IMAGE",
            )
        return known

    async def _newest_first(self, repository: str) -> list[ObjectStat]:
        prefix = self._keys.starts_of(repository)
        found = [stat async for stat in self._store.list(prefix)]
        return sorted(found, key=lambda stat: (stat.modified, stat.key), reverse=True)[:4]

    async def _record(self, key: str) -> StartRecord | None:
        try:
            return StartRecord.decode(await self._store.get(key, limit=MAX_RECORD))
        except NotFound:
            return None
        except (Corrupt, Unsupported) as error:
            log.warning("start record %s is not usable: %s", key, error)
            return None

    async def _load(self, record: StartRecord, *, own: bool) -> KnownStart | None:
        name = bytes.fromhex(record.profile)
        try:
            raw = await self._get_sealed(self._keys.profile(name), name, codec.MAX_ENCODED)
            profile = codec.decode_profile(raw)
        except (NotFound, Corrupt, Unsupported) as error:
            log.warning("the profile of %s is not usable: %s", record.image, error)
            return None
        return KnownStart(record, profile, await self._boot(record), own)

    async def _boot(self, record: StartRecord) -> BootTable | None:
        if not record.boot_table:
            return None
        name = bytes.fromhex(record.boot_table)
        try:
            raw = await self._get_sealed(self._keys.boot_table(name), name, boot.MAX_ENCODED)
            return BootTable.decode(raw)
        except (NotFound, Corrupt, Unsupported) as error:
            log.warning("the boot table of %s is not usable: %s", record.image, error)
            return None

    async def save(self, repository: str, profile: Profile, table: BootTable | None) -> StartRecord:
        """Stores a profile, and the table of a boot pack that is stored already.

        The record that points to them is written last: from then on exports use them.
        """
        name, sealed = seal(codec.encode_profile(profile))
        await self._store.put(self._keys.profile(name), sealed)
        table_name = b""
        if table is not None:
            table_name, sealed = seal(table.encode())
            await self._store.put(self._keys.boot_table(table_name), sealed)
        record = StartRecord(
            repository=repository,
            image=profile.image,
            block_image=profile.block_image.hex(),
            profile=name.hex(),
            boot_table=table_name.hex(),
            sources=profile.sources,
        )
        await self._store.put(self._keys.start(repository, profile.image), record.encode())
        return record

    async def forget(self, repository: str, image: str) -> None:
        """Drops what is known of an image's start; its objects stay until collection."""
        await self._store.delete(self._keys.start(repository, image))
