"""From the bytes of one ranged read to verified chunks. Pure; what is long runs in threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imagecache.blockimage.locations import Location
from imagecache.blockimage.seals import NO_KEY, NO_SEALS, Seals
from imagecache.chunks import chunk_digest
from imagecache.chunks.codec import Codec, decode_chunk
from imagecache.errors import Corrupt


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chunk inside a read: its place in the pack, its plaintext bytes and its digest."""

    location: Location
    length: int
    digest: bytes
    seals: Seals = NO_SEALS


def is_lone_raw(wanted: Sequence[Wanted]) -> bool:
    """Whether this is one chunk stored as it is: a digest of 256 KiB costs less than a thread."""
    return len(wanted) == 1 and _is_raw(wanted[0].location)


def decode_all(body: bytes, offset: int, wanted: Sequence[Wanted]) -> list[bytes | Corrupt]:
    """The plaintext of each wanted chunk, or why it is not to be shown.

    `body` are a pack's stored bytes from `offset` on. Raises Denied without a chunk's secret.
    """
    return [_decode(body, chunk.location.offset - offset, chunk) for chunk in wanted]


def _is_raw(place: Location) -> bool:
    return place.codec == Codec.RAW and place.key_id == NO_KEY


def _decode(body: bytes, at: int, chunk: Wanted) -> bytes | Corrupt:
    place = chunk.location
    try:
        stored: bytes | memoryview = memoryview(body)[at : at + place.stored_length]
        if len(stored) == len(body) and _is_raw(place):
            stored = body  # all of it is the chunk: no copy is made
        opened = chunk.seals.open_chunk(place.key_id, chunk.digest, stored)
        plaintext = decode_chunk(place.codec, opened, chunk.length)
    except Corrupt as error:
        return Corrupt(f"chunk {chunk.digest.hex()} in pack {place.pack.hex()}: {error.message}")
    if chunk_digest(plaintext) != chunk.digest:
        return Corrupt(
            f"chunk {chunk.digest.hex()} in pack {place.pack.hex()} does not match its digest"
        )
    return plaintext
