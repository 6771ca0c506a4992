"""Which secrets a sealed realm still needs: by small object, and by chunk of what images name."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from imagecache.blockimage.envelope import MAX_PLAINTEXT, unseal
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.records import MAX_RECORD, LayerRecord, RootRecord, StartRecord
from imagecache.catalog import Catalog
from imagecache.errors import Corrupt, LimitExceeded, NotFound, Unsupported, UsageError
from imagecache.profile.boot import BootTable
from imagecache.store.sealed import SealedStore

_DAMAGED = (NotFound, Corrupt, LimitExceeded, Unsupported)


async def count_key_ids(catalog: Catalog) -> dict[int, tuple[int, int]]:
    """By key id: small objects, and stored bytes of the chunks that readable tables name.

    Key id 0 is what lies in the clear by design. UsageError for a realm that is not sealed.
    """
    store = catalog.store
    if not isinstance(store, SealedStore):
        raise UsageError("the realm is not sealed", remedy="[encryption] secrets")
    objects: dict[int, int] = defaultdict(int)
    chunks: dict[int, int] = defaultdict(int)
    for key in [stat.key async for stat in store.list(catalog.keys.prefix)]:
        try:
            objects[await store.key_id_of(key)] += 1
        except NotFound:
            continue
    places = {
        (place.pack, place.offset): place
        for table in await named_tables(catalog)
        for place in map(table.locate, range(len(table)))
    }
    for place in places.values():
        chunks[place.key_id] += place.stored_length
    for table in await _boot_tables(catalog):
        for entry in table.entries:
            chunks[entry.key_id] += entry.stored_length
    return {key_id: (objects[key_id], chunks[key_id]) for key_id in objects | chunks}


async def _boot_tables(catalog: Catalog) -> list[BootTable]:
    """The boot tables that start records name, damaged ones left out."""
    found: list[BootTable] = []
    for generation in await catalog.readable_generations():
        prefix = f"{catalog.keys.within(generation)}starts/"
        for key in [stat.key async for stat in catalog.store.list(prefix)]:
            try:
                record = StartRecord.decode(await catalog.store.get(key, limit=MAX_RECORD))
                if record.boot_table:
                    name = bytes.fromhex(record.boot_table)
                    where = catalog.keys.boot_table(name, generation)
                    raw = await catalog.store.get(where, limit=MAX_PLAINTEXT)
                    found.append(BootTable.decode(unseal(raw, name)))
            except _DAMAGED:
                continue
    return found


async def named_tables(catalog: Catalog) -> list[LocationTable]:
    """The location tables of all readable roots and layer records, each once."""
    found: dict[str, LocationTable] = {}
    for generation in await catalog.readable_generations():
        keys = catalog.keys
        for prefix in (keys.roots(generation), keys.layers(generation)):
            for key in [stat.key async for stat in catalog.store.list(prefix)]:
                try:
                    raw = await catalog.store.get(key, limit=MAX_RECORD)
                    record = (
                        RootRecord.decode(raw)
                        if prefix == keys.roots(generation)
                        else LayerRecord.decode(raw)
                    )
                    name = record.locations
                    if name not in found:
                        table = await catalog.sealed("locations", bytes.fromhex(name), generation)
                        found[name] = await asyncio.to_thread(LocationTable.decode, table)
                except _DAMAGED:
                    continue  # what is damaged is the scrub's to tell
    return list(found.values())
