"""Cutting and encoding of chunks."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagecache.chunks import BLOCK, MAX_CHUNK_BYTES
from imagecache.chunks.codec import ChunkEncoder, Codec, decode_chunk
from imagecache.chunks.cut import FORMAT_CUT_RULE, squeeze, zero_runs
from imagecache.errors import Corrupt

pytestmark = pytest.mark.quick


@given(st.lists(st.sampled_from([b"\0" * BLOCK, b"\0x" + b"\0" * (BLOCK - 2), b"y" * BLOCK])))
def test_zero_runs_are_exactly_the_zero_blocks(blocks: list[bytes]) -> None:
    buffer = b"".join(blocks)
    told = [is_zero for is_zero, _, count in zero_runs(buffer) for _ in range(count)]
    assert told == [block == bytes(BLOCK) for block in blocks]
    plaintext, runs = squeeze(buffer)
    assert plaintext == b"".join(block for block in blocks if block != bytes(BLOCK))
    assert sum(count for _, count in runs) == len(blocks)


def test_what_compresses_little_is_stored_raw() -> None:
    noise = os.urandom(MAX_CHUNK_BYTES)
    assert ChunkEncoder().encode(noise) == (Codec.RAW, noise)
    codec, stored = ChunkEncoder().encode(b"text" * (BLOCK // 4))
    assert codec == Codec.ZSTD
    assert decode_chunk(codec, stored, BLOCK) == b"text" * (BLOCK // 4)


def test_damaged_frames_are_corrupt_and_never_longer_than_asked() -> None:
    """G12: a damaged or swapped chunk is found before it is used; a bomb allocates nothing."""
    codec, stored = ChunkEncoder().encode(b"text" * (BLOCK // 4))
    dice = random.Random(4)
    for _ in range(300):
        damaged = bytearray(stored)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        try:
            assert len(decode_chunk(codec, bytes(damaged), BLOCK)) == BLOCK
        except Corrupt:
            pass
    _, bomb = ChunkEncoder().encode(bytes(64 * BLOCK))
    with pytest.raises(Corrupt):
        decode_chunk(Codec.ZSTD, bomb, BLOCK)
    for length in (0, -BLOCK, BLOCK + 1, MAX_CHUNK_BYTES + BLOCK):
        with pytest.raises(Corrupt):
            decode_chunk(Codec.RAW, b"x" * BLOCK, length)
    with pytest.raises(Corrupt, match="unknown"):
        decode_chunk(9, stored, BLOCK)


def test_groups_end_at_base_names_not_at_content() -> None:
    rule = FORMAT_CUT_RULE
    assert not rule.ends_group(rule.least_group_blocks - 1, 40, b"a/any", b"")
    names = [f"file{n}.py".encode() for n in range(4000)]
    ends = sum(rule.ends_group(rule.least_group_blocks, 2, b"a/" + name, b"") for name in names)
    assert 180 < ends < 330  # 2 of 32 blocks: about 250 of 4000
    assert rule.is_large(MAX_CHUNK_BYTES + 1)
    assert not rule.is_large(MAX_CHUNK_BYTES)
