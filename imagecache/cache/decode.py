"""From the bytes of one ranged read to verified chunks. Pure; the fetcher runs it in threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imagecache.blockimage.locations import Location
from imagecache.blockimage.seals import NO_SEALS, Seals
from imagecache.chunks import chunk_digest
from imagecache.chunks.codec import decode_chunk
from imagecache.errors import Corrupt


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chunk inside a read: its place in the pack, its plaintext bytes and its digest."""

    location: Location
    length: int
    digest: bytes
    seals: Seals = NO_SEALS


def decode_all(body: bytes, offset: int, wanted: Sequence[Wanted]) -> list[bytes | Corrupt]:
    """The plaintext of each wanted chunk, or why it is not to be shown.

    `body` are a pack's stored bytes from `offset` on. Raises Denied without a chunk's secret.
    """
    view = memoryview(body)
    return [_decode(view, chunk.location.offset - offset, chunk) for chunk in wanted]


def _decode(view: memoryview, at: int, chunk: Wanted) -> bytes | Corrupt:
    place = chunk.location
    try:
        stored = view[at : at + place.stored_length]
        opened = chunk.seals.open_chunk(place.key_id, chunk.digest, stored)
        plaintext = decode_chunk(place.codec, opened, chunk.length)
    except Corrupt as error:
        return Corrupt(f"chunk {chunk.digest.hex()} in pack {place.pack.hex()}: {error.message}")
    if chunk_digest(plaintext) != chunk.digest:
        return Corrupt(
            f"chunk {chunk.digest.hex()} in pack {place.pack.hex()} does not match its digest"
        )
    return plaintext
