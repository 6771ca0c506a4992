"""Caps on what one layer may make us allocate or loop over.

Those with a text are settings, `[limits]`; the others are what Linux and the faces can hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def _limit(default: int, text: str) -> Any:
    return field(default=default, metadata={"text": text, "reload": True})


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps for one layer, in bytes or counts; going over one raises `LimitExceeded`.

    Defaults admit every image that we know of (10 GB single files, a million entries in one
    directory, all-zero layers) and stop the known bombs early.
    """

    layer_bytes: int = _limit(256 * GIB, "Bytes of a layer, unpacked.")
    # Gzip of zeros is 1030:1, and honest layers hold some zeros: hence the floor.
    ratio: int = _limit(250, "Unpacked bytes of a layer by packed ones, beyond the floor.")
    ratio_floor: int = _limit(1 * GIB, "Unpacked bytes of a layer that any ratio may have.")
    # What `zstd --long` makes by default.
    window_bytes: int = _limit(128 * MIB, "Window of a zstd frame.")
    # zstd:chunked makes one frame per file.
    frames: int = _limit(1 << 21, "Gzip members or zstd frames of a layer.")

    entries: int = _limit(2_000_000, "Files of a layer.")
    path_total_bytes: int = _limit(512 * MIB, "All paths of a layer together, written out.")
    depth: int = _limit(2048, "Components of a path.")
    logical_bytes: int = _limit(512 * GIB, "Sizes of all files of a layer, holes included.")
    sparse_segments: int = _limit(1 << 20, "Pieces of data of one sparse file.")
    extension_bytes: int = _limit(1 * MIB, "One PAX header or long name.")
    xattrs: int = _limit(1024, "Extended attributes of one file.")
    xattr_total_bytes: int = _limit(128 * KIB, "Extended attributes of one file together.")
    distinct_xattr_bytes: int = _limit(256 * MIB, "All different extended attributes of a layer.")

    path_bytes: int = 4095  # Linux PATH_MAX without its NUL
    name_bytes: int = 255
    symlink_bytes: int = 4095
    symlink_hops: int = 40  # what the kernel follows too
    extensions_in_row: int = 16  # extension headers before one member
    xattr_name_bytes: int = 255  # namespace included
    xattr_value_bytes: int = 65535  # EROFS counts them in 16 bits
    table_bytes: int = 1 * GIB  # an encoded file table


STORED = Limits(
    entries=1 << 30,
    path_total_bytes=1 << 40,
    depth=1 << 20,
    logical_bytes=1 << 62,
    xattrs=1 << 16,
    xattr_total_bytes=1 << 32,
    distinct_xattr_bytes=1 << 40,
)
"""For tables that are in the store: whoever built them had a reason for the limits they passed."""
