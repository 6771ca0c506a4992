"""The bytes of a profile: canonical, versioned, every count capped before anything is allocated."""

from __future__ import annotations

import re
import struct
from array import array

from imagecache.blockimage.extents import packed, unpacked
from imagecache.errors import Corrupt, LimitExceeded, Unsupported
from imagecache.profile.profile import (
    MAX_PATH,
    MAX_PATH_BYTES,
    MAX_PATHS,
    MAX_SOURCES,
    MAX_TOUCHES,
    MetadataRange,
    Profile,
    Touch,
)

MAGIC = b"CCPROFL1"
VERSION = 1
# magic, version, image digest length, sources, paths, touches, metadata ranges, path bytes,
# block image
HEADER = struct.Struct("<8sHHIIIII32s")
MAX_ENCODED = 64 << 20
_IMAGE = re.compile(rb"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def encode_profile(profile: Profile) -> bytes:
    """The canonical bytes; LimitExceeded for a profile over the format's caps."""
    ordinal_of: dict[bytes, int] = {}
    ordinals = array("I")
    for touch in profile.touches:
        ordinals.append(ordinal_of.setdefault(touch.path, len(ordinal_of)))
    paths = b"".join(ordinal_of)
    if (
        len(profile.touches) > MAX_TOUCHES
        or len(profile.metadata) > MAX_TOUCHES
        or len(ordinal_of) > MAX_PATHS
        or len(paths) > MAX_PATH_BYTES
    ):
        raise LimitExceeded(f"a profile of {len(profile.touches)} touches is over the format's cap")
    image = profile.image.encode()
    header = HEADER.pack(
        MAGIC,
        VERSION,
        len(image),
        min(profile.sources, MAX_SOURCES),
        len(ordinal_of),
        len(profile.touches),
        len(profile.metadata),
        len(paths),
        profile.block_image,
    )
    return b"".join(
        (
            header,
            image,
            packed(array("I", map(len, ordinal_of)), "I"),
            paths,
            packed(ordinals, "I"),
            packed(array("I", [touch.start_block for touch in profile.touches]), "I"),
            packed(array("I", [touch.blocks for touch in profile.touches]), "I"),
            packed(array("I", [min(touch.seen, MAX_SOURCES) for touch in profile.touches]), "I"),
            packed(array("I", [part.start_block for part in profile.metadata]), "I"),
            packed(array("I", [part.blocks for part in profile.metadata]), "I"),
        )
    )


def decode_profile(plaintext: bytes) -> Profile:
    """Raises Corrupt for damaged bytes, Unsupported for a newer version."""
    if len(plaintext) < HEADER.size:
        raise Corrupt("a profile is truncated")
    fields = HEADER.unpack_from(plaintext)
    magic, version, image_length, sources, path_count, touch_count, ranges, path_bytes, block = (
        fields
    )
    if magic != MAGIC:
        raise Corrupt("not a profile")
    if version > VERSION:
        raise Unsupported(f"a profile of version {version}", remedy="needs a newer cubecache")
    if (
        max(touch_count, ranges) > MAX_TOUCHES
        or path_count > min(MAX_PATHS, touch_count)
        or path_bytes > MAX_PATH_BYTES
        or sources > MAX_SOURCES
    ):
        raise Corrupt("a profile has counts over the format's caps")
    rows = 4 * path_count + path_bytes + 16 * touch_count + 8 * ranges
    if len(plaintext) != HEADER.size + image_length + rows:
        raise Corrupt("a profile has a wrong length for its counts")
    view = memoryview(plaintext)
    at = HEADER.size + image_length
    image = bytes(view[HEADER.size : at])
    if not _IMAGE.fullmatch(image):
        raise Corrupt("a profile names no image")
    lengths = unpacked(view[at : at + 4 * path_count], "I")
    at += 4 * path_count
    paths = _paths(bytes(view[at : at + path_bytes]), lengths)
    at += path_bytes
    columns = []
    for count in (touch_count,) * 4 + (ranges,) * 2:
        columns.append(unpacked(view[at : at + 4 * count], "I"))
        at += 4 * count
    ordinals, starts, blocks, seen, range_starts, range_blocks = columns
    if (touch_count and (max(ordinals) >= path_count or not min(blocks))) or (
        ranges and not min(range_blocks)
    ):
        raise Corrupt("a profile names a path that it does not have, or no blocks")
    return Profile(
        image=image.decode(),
        block_image=block,
        sources=sources,
        touches=tuple(
            Touch(paths[ordinal], start, count, times)
            for ordinal, start, count, times in zip(ordinals, starts, blocks, seen, strict=True)
        ),
        metadata=tuple(map(MetadataRange, range_starts, range_blocks)),
    )


def _paths(joined: bytes, lengths: array[int]) -> list[bytes]:
    paths, at = [], 0
    for length in lengths:
        if not 0 < length <= MAX_PATH:
            raise Corrupt("a profile has a path of no bytes, or over the cap")
        paths.append(joined[at : at + length])
        at += length
    if at != len(joined) or len(set(paths)) != len(paths):
        raise Corrupt("a profile's paths do not add up")
    return paths
