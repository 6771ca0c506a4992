"""What was found wrong, and the markers that tell others of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from imagecache.blockimage.jsonrecord import MAX_RECORD, decode_record, encode_record, texts
from imagecache.blockimage.locations import pack_name, split_pack_name
from imagecache.blockimage.records import HEX64
from imagecache.catalog import Catalog
from imagecache.errors import NotFound

MAX_MARKED = 50_000
_MARKER = re.compile(r"(\d{8})-([0-9a-f]{64})\.json")


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong: the object's key, what it is of, and for packs the chunks."""

    key: str
    what: str
    chunks: tuple[bytes, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For reports."""
        return {"key": self.key, "what": self.what, "chunks": [x.hex() for x in self.chunks]}


async def quarantine(catalog: Catalog, pack: bytes, chunks: tuple[bytes, ...]) -> None:
    """Marks chunks of a pack as damaged, so that no build takes them over; adds to a marker."""
    known = set(await quarantined(catalog, pack)) | set(chunks)
    _, digest = split_pack_name(pack)
    fields = {
        "pack": digest.hex(),
        "chunks": sorted(chunk.hex() for chunk in known)[:MAX_MARKED],
    }
    await catalog.store.put(catalog.keys.quarantined(pack), encode_record("quarantine", fields))


async def quarantined(catalog: Catalog, pack: bytes) -> tuple[bytes, ...]:
    """The chunks of a pack that are marked; none where it has no marker."""
    try:
        raw = await catalog.store.get(catalog.keys.quarantined(pack), limit=MAX_RECORD)
    except NotFound:
        return ()
    fields = decode_record("quarantine", raw)
    return tuple(bytes.fromhex(chunk) for chunk in texts(fields, "chunks", HEX64))


async def quarantined_packs(catalog: Catalog) -> set[bytes]:
    """Names of the packs that have a marker."""
    prefix, found = catalog.keys.quarantine, set()
    async for stat in catalog.store.list(prefix):
        name = _MARKER.fullmatch(stat.key.removeprefix(prefix))
        if name is not None:
            found.add(pack_name(bytes.fromhex(name[2]), int(name[1])))
    return found
