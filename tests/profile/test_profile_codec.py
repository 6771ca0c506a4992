"""Profiles and boot tables as bytes: canonical, and refused by name where they are damaged."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagecache.errors import Corrupt, LimitExceeded, Unsupported
from imagecache.packs.pack import HEADER as PACK_HEADER
from imagecache.packs.pack import PackedChunk
from imagecache.profile import boot, codec
from imagecache.profile.boot import BootTable
from imagecache.profile.codec import decode_profile, encode_profile
from imagecache.profile.profile import MAX_TOUCHES, MetadataRange, Profile, Touch

pytestmark = pytest.mark.quick
IMAGE = "sha256:" + "ab" * 32
u32 = st.integers(0, 2**32 - 1)
count = st.integers(1, 2**32 - 1)
touches = st.builds(Touch, st.binary(min_size=1, max_size=40), u32, count, st.integers(0, 65536))
profiles = st.builds(
    Profile,
    st.just(IMAGE),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 65536),
    st.lists(touches, max_size=30).map(tuple),
    st.lists(st.builds(MetadataRange, u32, count), max_size=10).map(tuple),
)


def example() -> Profile:
    return Profile(
        IMAGE,
        bytes(range(32)),
        2,
        (Touch(b"usr/bin/x", 0, 3, 2), Touch(b"lib/y", 7, 1), Touch(b"usr/bin/x", 9, 2)),
        (MetadataRange(0, 4), MetadataRange(9, 1)),
    )


def table() -> BootTable:
    at, entries = len(PACK_HEADER), []
    for number in range(3):
        entries.append(PackedChunk(bytes([number]) * 32, at, 100 + number, 2, 1, 0))
        at += 100 + number
    return BootTable(b"i" * 32, b"p" * 32, b"n" * 32, at + 500, tuple(entries))


@given(profiles)
def test_a_profile_comes_back_as_it_was(profile: Profile) -> None:
    assert decode_profile(encode_profile(profile)) == profile


def test_a_boot_table_comes_back_as_it_was() -> None:
    assert BootTable.decode(table().encode()) == table()


@pytest.mark.parametrize("decode", [decode_profile, BootTable.decode])
def test_every_cut_and_many_flips_are_refused_or_mean_something_valid(decode) -> None:
    """Damaged bytes raise Corrupt or Unsupported, never anything else, and never allocate much."""
    raw = encode_profile(example()) if decode is decode_profile else table().encode()
    for length in range(len(raw)):
        with pytest.raises((Corrupt, Unsupported)):
            decode(raw[:length])
    rng = random.Random(1)
    for _ in range(5000):
        damaged = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            decode(bytes(damaged))
        except (Corrupt, Unsupported):
            pass


def test_a_newer_version_is_refused_by_name() -> None:
    for raw, at, decode in (
        (encode_profile(example()), 8, decode_profile),
        (table().encode(), 8, BootTable.decode),
    ):
        newer = raw[:at] + (2).to_bytes(2, "little") + raw[at + 2 :]
        with pytest.raises(Unsupported, match="newer"):
            decode(newer)


def test_claimed_counts_are_capped_before_anything_is_read() -> None:
    for field, column in ((16, 1), (20, 2), (24, 3), (28, 4)):
        raw = bytearray(encode_profile(example()))
        raw[field : field + 4] = b"\xff\xff\xff\xff"
        with pytest.raises(Corrupt, match="caps"):
            decode_profile(bytes(raw))
        del column
    raw = bytearray(table().encode())
    raw[12:16] = (boot.MAX_ENTRIES + 1).to_bytes(4, "little")
    with pytest.raises(Corrupt, match="count"):
        BootTable.decode(bytes(raw))


def test_a_profile_over_the_caps_is_not_written() -> None:
    many = tuple(Touch(b"x", n, 1) for n in range(MAX_TOUCHES + 1))
    with pytest.raises(LimitExceeded):
        encode_profile(Profile(IMAGE, bytes(32), 1, many, ()))


def test_chunks_of_a_boot_table_follow_each_other() -> None:
    entries = list(table().entries)
    entries.reverse()
    wrong = BootTable(b"i" * 32, b"p" * 32, b"n" * 32, 9999, tuple(entries))
    with pytest.raises(Corrupt, match="follow"):
        BootTable.decode(wrong.encode())
    assert codec.VERSION == 1
