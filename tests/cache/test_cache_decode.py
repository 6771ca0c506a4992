"""Decoding one ranged read: what is copied, what goes to a thread, what is refused."""

from __future__ import annotations

import random

import pytest

from imagecache.blockimage.locations import Location
from imagecache.blockimage.seals import NO_KEY
from imagecache.cache.decode import Wanted, decode_all, is_lone_raw
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.chunks.codec import ChunkEncoder, Codec
from imagecache.errors import Corrupt

pytestmark = pytest.mark.quick

NOISE = random.Random(5).randbytes(4 * BLOCK)


def wanted(
    plaintext: bytes,
    *,
    offset: int,
    codec: Codec = Codec.RAW,
    stored: int = 0,
    key_id: int = NO_KEY,
) -> Wanted:
    place = Location(b"p" * 32, offset, stored or len(plaintext), codec, key_id)
    return Wanted(place, len(plaintext), chunk_digest(plaintext))


def test_a_read_that_is_one_raw_chunk_is_its_plaintext_without_a_copy() -> None:
    (found,) = decode_all(NOISE, 8192, [wanted(NOISE, offset=8192)])
    assert found is NOISE


def test_one_raw_chunk_of_a_longer_read_keeps_no_more_than_itself() -> None:
    body = NOISE + bytes(BLOCK)
    (found,) = decode_all(body, 0, [wanted(NOISE, offset=0)])
    assert isinstance(found, bytes)
    assert found == NOISE


@pytest.mark.parametrize("length", [len(NOISE) - 1, len(NOISE)], ids=["short", "flipped"])
def test_a_raw_chunk_that_is_not_what_it_should_be_is_refused(length: int) -> None:
    body = bytearray(NOISE[:length])
    body[100] ^= 1
    (found,) = decode_all(bytes(body), 0, [wanted(NOISE, offset=0)])
    assert isinstance(found, Corrupt)


def test_only_one_chunk_stored_as_it_is_needs_no_thread() -> None:
    raw = wanted(NOISE, offset=0)
    codec, packed = ChunkEncoder().encode(bytes(range(256)) * 16)
    assert codec is Codec.ZSTD
    zstd = wanted(bytes(range(256)) * 16, offset=0, codec=codec, stored=len(packed))
    assert is_lone_raw([raw])
    assert not is_lone_raw([raw, raw])
    assert not is_lone_raw([zstd])
    assert not is_lone_raw([wanted(NOISE, offset=0, key_id=1)])
