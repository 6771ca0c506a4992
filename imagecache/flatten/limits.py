"""Caps on what one layer may make us allocate or loop over; every one is configurable."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps for one layer, in bytes or counts; going over one raises `LimitExceeded`.

    Defaults admit every image that we know of (10 GB single files, a million entries in one
    directory, all-zero layers) and stop the known bombs early.
    """

    layer_bytes: int = 256 * GIB  # plaintext tar
    ratio: int = 250  # plaintext / compressed, looked at above `ratio_floor` only
    ratio_floor: int = 1 * GIB  # gzip of zeros is 1030:1, and honest layers hold some zeros
    window_bytes: int = 128 * MIB  # zstd; what `zstd --long` makes by default
    frames: int = 1 << 21  # gzip members or zstd frames (zstd:chunked makes one per file)

    entries: int = 2_000_000  # tar members that describe a file; also names in a decoded table
    path_bytes: int = 4095  # Linux PATH_MAX without its NUL
    path_total_bytes: int = 512 * MIB  # of all names of a layer, written out
    name_bytes: int = 255
    depth: int = 2048
    symlink_bytes: int = 4095
    symlink_hops: int = 40  # what the kernel follows too
    logical_bytes: int = 512 * GIB  # sum of file sizes, holes included
    sparse_segments: int = 1 << 20  # of one file

    extension_bytes: int = 1 * MIB  # one pax header or GNU long name
    extensions_in_row: int = 16  # extension headers before one member
    xattrs: int = 1024  # of one file
    xattr_name_bytes: int = 255  # namespace included
    xattr_value_bytes: int = 65535  # EROFS counts them in 16 bits
    xattr_total_bytes: int = 128 * KIB  # of one file
    table_bytes: int = 1 * GIB  # an encoded file table
    distinct_xattr_bytes: int = 256 * MIB  # all different xattr sets of a layer together
