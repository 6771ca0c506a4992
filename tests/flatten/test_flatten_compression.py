"""Layer compression: rows C1-C5 and the codec's rule of trailing bytes."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard
from kits.layersdisk import table_of
from kits.tarlayer import TarLayer

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten.decompress import open_layer
from imagecache.flatten.limits import Limits

pytestmark = pytest.mark.quick
LIMITS = Limits()


class Dribble(io.RawIOBase):
    """A blob whose reads end at given places."""

    def __init__(self, blob: bytes, splits: list[int]) -> None:
        self.blob = blob
        self.splits = [*splits, len(blob)]
        self.at = 0

    def read(self, size: int = -1) -> bytes:
        stop = next((s for s in self.splits if s > self.at), len(self.blob))
        piece = self.blob[self.at : min(stop, self.at + size if size >= 0 else stop)]
        self.at += len(piece)
        return piece


def plain(blob: bytes, limits: Limits = LIMITS) -> bytes:
    stream = open_layer(io.BytesIO(blob), limits)
    return b"".join(iter(stream.piece, b""))


def skippable(size: int, number: int = 0) -> bytes:
    return bytes([0x50 + number]) + b"\x2a\x4d\x18" + size.to_bytes(4, "little") + b"s" * size


def test_gzip_members_at_every_split() -> None:
    """C1: three gzip members, the read split at every byte, give the full content."""
    blob = b"".join(gzip.compress(part, mtime=0) for part in (b"one " * 9, b"", b"three " * 5))
    for split in range(1, len(blob)):
        stream = open_layer(Dribble(blob, [split]), LIMITS)
        assert b"".join(iter(stream.piece, b"")) == b"one " * 9 + b"three " * 5
    stream = open_layer(Dribble(blob, list(range(2, len(blob)))), LIMITS)
    assert b"".join(iter(stream.piece, b"")) == b"one " * 9 + b"three " * 5


def test_gzip_trailing_bytes() -> None:
    """C2: zeros after the last member are skipped; anything else is refused."""
    blob = gzip.compress(b"content")
    assert plain(blob + bytes(1)) == b"content"
    assert plain(blob + bytes(1_000_000)) == b"content"
    for junk in (b"j", b"junk", b"\x1f", bytes(600_000) + b"j", b"\0" + blob):
        with pytest.raises(Rejected, match="follow the last gzip member"):
            plain(blob + junk)


def test_gzip_broken() -> None:
    """C3: a bad CRC, a bad length, and a cut at every byte are refused."""
    blob = gzip.compress(random.Random(1).randbytes(300))
    for at in (-8, -5, -4, -1):
        broken = bytearray(blob)
        broken[at] ^= 1
        with pytest.raises(Rejected):
            plain(bytes(broken))
    for length in range(2, len(blob)):
        with pytest.raises(Rejected, match="ends inside"):
            plain(blob[:length])


def gzip_of_zeros(size: int) -> Iterator[bytes]:
    block = gzip.compress(bytes(1 << 20), 9)
    for _ in range(size >> 20):
        yield block


def test_gzip_bomb() -> None:
    """C4: a gzip bomb is stopped by the ratio, once it is over the floor, early."""
    limits = Limits(ratio=100, ratio_floor=8 << 20)
    blob = b"".join(gzip_of_zeros(64 << 20))
    with pytest.raises(LimitExceeded, match="100:1"):
        plain(blob, limits)
    assert len(plain(blob[: len(blob) // 16], limits)) == 4 << 20
    with pytest.raises(LimitExceeded, match="larger than"):
        plain(blob, Limits(layer_bytes=10 << 20))


def run_length_frame(blocks: int) -> bytes:
    """A zstd frame of 128 KiB run-length blocks, four bytes each: 32,768 to 1."""
    body = b"\x28\xb5\x2f\xfd\x00\x58"
    for number in range(blocks):
        body += ((128 << 10) << 3 | 1 << 1 | (number == blocks - 1)).to_bytes(3, "little") + b"\0"
    return body


def test_zstd_bomb_in_bounded_memory() -> None:
    """C4: run-length blocks never expand more than a piece at once; the ratio stops them."""
    assert len(plain(run_length_frame(100))) == 100 * (128 << 10)
    tracemalloc.start()
    with pytest.raises(LimitExceeded, match="250:1"):
        stream = open_layer(io.BytesIO(run_length_frame(20_000)), Limits(ratio_floor=64 << 20))
        while piece := stream.piece():
            assert len(piece) <= 1 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_zstd_window() -> None:
    """C4: a frame that asks for a 2 GB window is refused before it gets one."""
    window_2g = bytes([(31 - 10) << 3])
    blob = b"\x28\xb5\x2f\xfd\x00" + window_2g + b"\x01\x00\x00"
    with pytest.raises(Rejected, match="memory"):
        plain(blob)


def test_zstd_skippable_frames() -> None:
    """C4: a million skippable frames cost counting only, and the count has a cap."""
    data = zstandard.compress(b"data")
    assert plain(skippable(10) + data + skippable(600_000, 15) + data) == b"datadata"
    with pytest.raises(LimitExceeded, match="frames"):
        plain(skippable(0) * 2000, Limits(frames=1000))
    with pytest.raises(Rejected, match="skippable"):
        plain(skippable(10)[:-1])


def test_nested_compression() -> None:
    """C4: compression inside compression is not peeled: the inner bytes are no tar."""
    inner = gzip.compress(TarLayer().file(b"x", b"y").bytes())
    with pytest.raises(Rejected, match="no tar header"):
        table_of(gzip.compress(inner + bytes(512)))


def test_zstd_frames() -> None:
    """C5: many frames, with and without content size and checksum, are one stream."""
    parts = [b"a" * 70_000, b"", random.Random(2).randbytes(400_000), b"end"]
    sizes = zstandard.ZstdCompressor(write_checksum=True)
    none = zstandard.ZstdCompressor(write_content_size=False, write_checksum=False)
    blob = b"".join((sizes, none)[i % 2].compress(part) for i, part in enumerate(parts))
    assert plain(blob) == b"".join(parts)
    small = b"".join(none.compress(b"frame %d" % i) for i in range(3000))
    assert plain(small) == b"".join(b"frame %d" % i for i in range(3000))


def test_zstd_broken() -> None:
    """C5: a cut at every byte, junk behind, and a bad checksum are refused."""
    blob = zstandard.ZstdCompressor(write_checksum=True).compress(b"hello" * 40)
    for length in range(4, len(blob)):
        with pytest.raises(Rejected):
            plain(blob[:length])
    for junk in (b"\0", bytes(100), b"junkjunkjunk"):
        with pytest.raises(Rejected, match="no zstd frame"):
            plain(blob + junk)
    broken = bytearray(blob)
    broken[-1] ^= 1
    with pytest.raises(Rejected):
        plain(bytes(broken))


def test_hasher_sees_the_plaintext_to_its_end() -> None:
    """Diff ids: the hasher is given exactly the tar's bytes, those behind its end too."""
    layer = TarLayer().file(b"x", b"y" * 5000).bytes() + b"trailing junk" * 100
    for blob in (layer, gzip.compress(layer), zstandard.compress(layer)):
        digest = hashlib.sha256()
        stream = open_layer(io.BytesIO(blob), LIMITS, digest)
        stream.drain()
        assert digest.digest() == hashlib.sha256(layer).digest()
        assert (stream.plain_bytes, stream.raw_bytes) == (len(layer), len(blob))
