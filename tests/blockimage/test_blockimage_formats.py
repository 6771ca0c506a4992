"""Layer indexes, manifests, locations and records: round trips, damage, caps."""

import random

import pytest
from blake3 import blake3

from imagecache.blockimage.envelope import seal, unseal
from imagecache.blockimage.extents import ExtentMap, PieceBuilder
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import Location, LocationTable, pack_name
from imagecache.blockimage.manifest import BlockManifest, Face, PlacedLayer, canonical_options
from imagecache.blockimage.records import RootRecord
from imagecache.errors import Corrupt, CubecacheError, Unsupported

pytestmark = pytest.mark.quick


def digest(n: int) -> bytes:
    return blake3(str(n).encode()).digest()


def region():
    builder = PieceBuilder()
    builder.chunk(digest(1), [(False, 5), (True, 3), (False, 2)])
    builder.zeros(100)
    builder.chunk(digest(2), [(False, 64)])
    builder.chunk(digest(2), [(False, 64)])
    builder.zeros(1)
    return builder.finish()


def manifest() -> BlockManifest:
    chunks, pieces = region()
    return BlockManifest(
        face=Face.EROFS,
        options=canonical_options({"b": 1, "a": "x"}),
        disk_blocks=pieces.total_blocks,
        metadata_blocks=10,
        window_blocks=10,
        layers=(PlacedLayer(digest(9), 10, pieces.total_blocks - 10),),
        chunks=chunks,
        pieces=pieces,
    )


def test_extents_find_every_block() -> None:
    chunks, pieces = region()
    extents = ExtentMap(pieces, chunks)
    assert extents.disk_blocks == 5 + 3 + 2 + 100 + 64 + 64 + 1
    assert list(extents.starts) == [0, 8, 110, 174]
    assert list(extents.offsets) == [0, 5, 0, 0]
    assert list(extents.ordinals) == [0, 0, 1, 1]
    assert list(extents.overlapping(0, 5)) == [0]
    assert list(extents.overlapping(5, 8)) == []
    assert list(extents.overlapping(4, 9)) == [0, 1]
    assert list(extents.overlapping(109, 239)) == [2, 3]


def test_manifest_round_trip() -> None:
    first = manifest()
    again = BlockManifest.decode(first.encode())
    assert again == first
    assert again.encode() == first.encode()


def test_layer_index_round_trip() -> None:
    chunks, pieces = region()
    index = LayerIndex("sha256:" + "a" * 64, b"file table", chunks, pieces)
    assert LayerIndex.decode(index.encode()) == index


def test_location_table_round_trip() -> None:
    places = [Location(pack_name(digest(n % 3), 7), n * 10, n + 1, n % 2, 0) for n in range(50)]
    table = LocationTable.build(digest(0), places)
    again = LocationTable.decode(table.encode())
    assert [again.locate(n) for n in range(50)] == places


@pytest.mark.parametrize("seed", range(20))
def test_damage_is_a_typed_error(seed: int) -> None:
    """D1, D2: truncation at every byte, and flips, never escape as anything but our errors."""
    chunks, pieces = region()
    originals = [
        (BlockManifest.decode, manifest().encode()),
        (LayerIndex.decode, LayerIndex("sha256:" + "a" * 64, b"ft", chunks, pieces).encode()),
        (
            LocationTable.decode,
            LocationTable.build(
                digest(0), [Location(pack_name(digest(1), 1), 8, 9, 1, 0)]
            ).encode(),
        ),
    ]
    dice = random.Random(seed)
    for decode, raw in originals:
        for cut in range(len(raw)):
            with pytest.raises(CubecacheError):
                decode(raw[:cut])
        for _ in range(200):
            damaged = bytearray(raw)
            damaged[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            try:
                decode(bytes(damaged))
            except CubecacheError:
                pass


def test_newer_version_is_named() -> None:
    """D4: an index from a newer format version is refused without a guess."""
    raw = bytearray(manifest().encode())
    raw[8] = 2
    with pytest.raises(Unsupported, match="version 2"):
        BlockManifest.decode(bytes(raw))


def test_envelope_holds_name_and_bytes_together() -> None:
    """D3: an object under another's name, or damaged, is Corrupt."""
    name, stored = seal(b"x" * 10_000)
    assert unseal(stored, name) == b"x" * 10_000
    other, _ = seal(b"y")
    with pytest.raises(Corrupt):
        unseal(stored, other)
    for at in range(len(stored)):
        damaged = bytearray(stored)
        damaged[at] ^= 0x41
        with pytest.raises(CubecacheError):
            unseal(bytes(damaged), name)
        with pytest.raises(CubecacheError):
            unseal(stored[:at], name)


def test_root_record_round_trip_and_strictness() -> None:
    record = RootRecord(
        realm="default",
        generation=1,
        image="sha256:" + "1" * 64,
        face="erofs",
        options="{}",
        format_version=1,
        platform="linux/amd64",
        config="sha256:" + "2" * 64,
        block_image="3" * 64,
        locations="4" * 64,
        layers=("sha256:" + "5" * 64,),
        packs=("6" * 72,),
        size_bytes=4096,
        chunks=1,
        packed_bytes=10,
    )
    assert RootRecord.decode(record.encode()) == record
    for broken in (
        b"",
        b"[]",
        b"{}",
        record.encode().replace(b'"chunks": 1', b'"chunks": -1'),
        record.encode().replace(b'"root"', b'"layer"'),
    ):
        with pytest.raises(Corrupt):
            RootRecord.decode(broken)


def test_block_image_digest_is_golden() -> None:
    """The block manifest's bytes are a format: a change of this digest is a new version."""
    assert blake3(manifest().encode()).hexdigest()[:16] == "d707ce9d6c239a18"
