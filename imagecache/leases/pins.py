"""Pins: an image stays for a time, whoever names or reads it."""

from __future__ import annotations

from dataclasses import dataclass

from imagecache.blockimage.generations import State
from imagecache.blockimage.holdings import PinRecord
from imagecache.blockimage.records import MAX_RECORD, RootRecord
from imagecache.catalog import Catalog
from imagecache.errors import Busy, NotFound


@dataclass(frozen=True, slots=True)
class Pin:
    """A pin as the store has it; `modified` in the store's seconds."""

    record: PinRecord
    modified: float


async def pin(catalog: Catalog, root: RootRecord, name: str, ttl_seconds: int) -> None:
    """Pins an image from now on; Busy where its generation is closing (ask again)."""
    key = catalog.keys.pin(root.image)
    await catalog.store.put(key, PinRecord(root.image, name, ttl_seconds).encode())
    if await catalog.state_of(root.generation) >= State.CLOSING:
        raise Busy(f"image {root.image} is being moved by a collection", remedy="pin it again")


async def unpin(catalog: Catalog, image: str) -> None:
    """Removes a pin; NotFound."""
    key = catalog.keys.pin(image)
    try:
        await catalog.store.stat(key)
    except NotFound:
        raise NotFound(f"image {image} is not pinned", remedy="cubecache pin --list") from None
    await catalog.store.delete(key)


async def pins(catalog: Catalog) -> list[Pin]:
    """Every pin, run out or not."""
    found = []
    async for stat in catalog.store.list(catalog.keys.pins):
        raw = await catalog.store.get(stat.key, limit=MAX_RECORD)
        found.append(Pin(PinRecord.decode(raw), stat.modified))
    return found
