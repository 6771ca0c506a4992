"""The file table's encoding: canonical, capped, and closed against broken bytes (rows D1, D2)."""

from __future__ import annotations

import hashlib
import random
import struct

import pytest
from kits.layersdisk import LIMITS, table_of
from kits.layersfixtures import every_kind, two_versions
from kits.tarlayer import TarLayer

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten.filetable import FileTable, region_layout
from imagecache.flatten.limits import Limits
from imagecache.flatten.tree import merge

pytestmark = pytest.mark.quick


COLUMNS = """entry_parent entry_inode names name_ends mode uid gid mtime mtime_ns size extra
xattr_set symlink_targets xattr_sets lower_links whiteouts opaques links first_entry""".split()


def small() -> TarLayer:
    return (
        TarLayer().file(b"b", b"1" * 5000, xattrs={b"user.b": b"2"}).hardlink(b"a", b"b")
        .symlink(b"dir/s", b"target").device(b"dir/d", b"3", 1, 3).hardlink(b"low", b"dir/lower")
        .whiteout(b"w").whiteout(b"dir/x").opaque(b"dir").file(b"z", b"", xattrs={b"user.z": b""})
        .file(b"y", b"2" * 4096, xattrs={b"user.b": b"2"})
    )  # fmt: skip


def test_round_trip() -> None:
    """Tables survive encoding; contents are left behind."""
    for layer in (small().bytes(), every_kind().bytes(), *two_versions(), b""):
        table = table_of(layer)
        encoded = table.encode()
        again = FileTable.decode(encoded, LIMITS)
        assert again.encode() == encoded
        for column in COLUMNS:
            assert getattr(again, column) == getattr(table, column), column
        assert set(again.contents) <= {-1}
        assert list(again.paths()) == list(table.paths())


def test_golden() -> None:
    """The format does not drift: a change of this digest is a new format version."""
    digest = hashlib.sha256(table_of(small().bytes()).encode()).hexdigest()
    assert digest == "88a7b04f960caee8ead3d867e8fa41ead26f10a046e021de641dbe36ebe79d65"


def test_tar_order_does_not_matter() -> None:
    """The same files in another tar order are the same table."""
    members = [(b"d%d/f%d" % (n % 7, n), b"x" * n) for n in range(60)]
    tables = set()
    for seed in range(4):
        random.Random(seed).shuffle(members)
        layer = TarLayer()
        for name, data in members:
            layer.file(name, data)
        tables.add(table_of(layer.bytes()).encode())
    assert len(tables) == 1


def test_cut_at_every_byte() -> None:
    """D1: cut anywhere, longer, of another magic or version: refused."""
    encoded = table_of(small().bytes()).encode()
    for length in range(len(encoded)):
        with pytest.raises(Rejected):
            FileTable.decode(encoded[:length], LIMITS)
    for bad in (encoded + b"\0", b"XXXX" + encoded[4:], encoded[:4] + b"\2\0" + encoded[6:],
                encoded[:6] + b"\1\0" + encoded[8:]):  # fmt: skip
        with pytest.raises(Rejected):
            FileTable.decode(bad, LIMITS)


def test_every_flipped_bit_is_refused_or_canonical() -> None:
    """D2: a flipped bit is refused, or makes another table in its one canonical form."""
    encoded = table_of(small().bytes()).encode()
    accepted = 0
    for at in range(len(encoded)):
        for bit in range(8):
            mutant = bytearray(encoded)
            mutant[at] ^= 1 << bit
            try:
                table = FileTable.decode(bytes(mutant), LIMITS)
            except Rejected:
                continue
            accepted += 1
            assert table.encode() == bytes(mutant)
            assert all(0 <= entry < table.entry_count for entry in table.first_entry)
            try:
                merge([table])
            except Rejected:
                continue
    assert accepted


def test_huge_counts_allocate_nothing() -> None:
    """D2: counts of 2^32-1 are refused before anything is allocated for them."""
    encoded = table_of(small().bytes()).encode()
    for field in range(12):
        at = 8 + 4 * field
        for value in (0xFFFFFFFF, 0x7FFFFFFF, 1_999_999):
            with pytest.raises(Rejected):
                FileTable.decode(
                    encoded[:at] + struct.pack("<I", value) + encoded[at + 4 :], LIMITS
                )
    with pytest.raises(LimitExceeded):
        FileTable.decode(encoded, Limits(entries=3))
    with pytest.raises(LimitExceeded):
        FileTable.decode(encoded, Limits(table_bytes=100))


def test_region_layout() -> None:
    """Regions: non-empty files in file-table order, each on a block, hard links once."""
    table = table_of(small().bytes())
    layout = region_layout(table)
    assert [table.first_path(inode) for inode in layout.inodes] == [b"a", b"y"]
    assert list(layout.start_blocks) == [0, 2]
    assert list(layout.blocks) == [2, 1]
    assert layout.total_blocks == 3
    assert [layout.find(block) for block in (-1, 0, 1, 2, 3)] == [None, 0, 0, 1, None]
    assert region_layout(table_of(b"")).find(0) is None
