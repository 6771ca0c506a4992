"""Tar headers, pax records and sparse maps: rows C6-C8, C16, C26-C34, C36-C38."""

from __future__ import annotations

import gzip
import io
import struct

import pytest
from kits.layersdisk import LIMITS, flat_listing, table_of
from kits.tarlayer import END, TarLayer, gnu_long, header, padded, pax

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten import kinds
from imagecache.flatten.decompress import open_layer
from imagecache.flatten.limits import Limits
from imagecache.flatten.tar import Header, members

pytestmark = pytest.mark.quick


def headers(layer: bytes, limits: Limits = LIMITS) -> list[Header]:
    return [member.header for member in members(open_layer(io.BytesIO(layer), limits), limits)]


def only(layer: bytes) -> Header:
    (item,) = headers(layer)
    return item


def content(layer: bytes) -> bytes:
    (data,) = flat_listing(layer).values()
    assert isinstance(data, bytes)
    return data


def test_truncated() -> None:
    """C6: cut in a header or in data is refused; no end block, or one, is accepted."""
    whole = header(b"a", size=700) + padded(b"x" * 700)
    assert [item.path for item in headers(whole)] == [b"a"]
    assert [item.path for item in headers(whole + bytes(512))] == [b"a"]
    assert [item.path for item in headers(whole[:-300])] == [b"a"]  # only padding is missing
    for length in range(1, 512 + 700):
        with pytest.raises(Rejected, match=r"ends at its byte|no tar header"):
            headers(whole[:length])
    with pytest.raises(Rejected, match="one zero block"):
        headers(whole + bytes(512) + header(b"b"))


def test_checksums() -> None:
    """C7: a bad checksum and an all-0xff header are refused; old Sun's signed sum is accepted."""
    assert only(header("\u00e9".encode() * 9, signed=True) + END).path == "\u00e9".encode() * 9
    for broken in (header(b"a", checksum=b"0012345\0"), b"\xff" * 512, b"x" * 512):
        with pytest.raises(Rejected, match="checksum"):
            headers(broken + END)
    good = header(b"a", size=0)
    for at in range(0, 512, 7):
        if not 148 <= at < 156:
            with pytest.raises(Rejected):
                headers(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :] + END)


@pytest.mark.parametrize(
    "size", [-1, 1 << 63, b"7x", b"0o17", b"1_0", b"+7", b"-7", b"99", b" " * 12, b"\xff" * 12]
)
def test_bad_sizes(size: int | bytes) -> None:
    """C8: negative, huge, garbled and blank sizes are refused."""
    with pytest.raises(Rejected):
        headers(header(b"a", size=size) + END)


def test_odd_numbers() -> None:
    """C8: octal with leading or trailing blanks, and base-256, are numbers."""
    for size in (b"   0000003 ", b"00000000003", b"3 ", b"3\0junk", b"\x80" + bytes(10) + b"\3"):
        assert content(header(b"a", size=size) + padded(b"abc") + END) == b"abc"


def test_link_payloads() -> None:
    """C16: a hard link's payload is skipped (pax), or is not there (GNU); the parser stays in
    step, and the target's attributes hold."""
    for link in (
        pax({b"mtime": b"5"}) + header(b"b", b"1", link=b"a", size=3, mode=0o777) + padded(b"xyz"),
        header(b"b", b"1", link=b"a", size=3, mode=0o777, uid=5) + padded(b"xyz"),
        header(b"b", b"1", link=b"a", size=3, magic=b"ustar  \0", mtime=9),
        header(b"b", b"1", link=b"a", size=3),
    ):
        layer = header(b"a", size=2) + padded(b"aa") + link + header(b"c") + END
        table = table_of(layer)
        assert list(table.paths()) == [b"", b"a", b"b", b"c"]
        assert table.entry_inode[1] == table.entry_inode[2]
        assert (table.mode[0], table.uid[0], table.size[0]) == (0o100644, 0, 2)
    for typeflag in b"23456":
        layer = header(b"x", bytes([typeflag]), link=b"t", size=1000) + header(b"y") + END
        assert [item.path for item in headers(layer)] == [b"x", b"y"]


def test_pax_overrides() -> None:
    """C26: path, linkpath, size, owner and time of a pax header win; empty values take back."""
    item = only(
        pax({b"path": b"long/" * 40 + b"n", b"uid": b"70000", b"gid": b"4294967294"})
        + header(b"short", uid=1)
        + END
    )
    assert (item.path, item.uid, item.gid) == (b"long/" * 40 + b"n", 70000, 2**32 - 2)
    assert only(pax({b"path": b""}) + header(b"short") + END).path == b"short"
    assert only(pax([(b"path", b"p"), (b"path", b"")]) + header(b"h") + END).path == b"h"
    assert content(pax({b"size": b"3"}) + header(b"a", size=0) + padded(b"abc") + END) == b"abc"
    assert only(pax({b"linkpath": b"to"}) + header(b"a", b"2", link=b"x") + END).link == b"to"
    binary = {b"hdrcharset": b"BINARY", b"path": b"\xff\xfe"}
    assert only(pax(binary) + header(b"a") + END).path == b"\xff\xfe"
    assert only(pax({b"path": b"gnu", b"comment": b"c"}) + header(b"a") + END).path == b"gnu"


@pytest.mark.parametrize(
    "body",
    [
        b"0 a=b\n", b"1 a=b\n", b"5 a=b\n", b"99 a=b\n", b"x a=b\n", b"-6 a=b\n", b"6 a=bX",
        b"6 a b\n", b"5 =b\n", b"99999999999 a=b\n", b"6a=b\n", b"\n", b" 6 a=b\n", b"6 a=b\n6 a=",
    ],
)  # fmt: skip
def test_pax_lies(body: bytes) -> None:
    """C26: a record whose length or form lies is refused, in global headers too."""
    for typeflag in (b"x", b"g"):
        with pytest.raises(Rejected, match="pax record"):
            headers(pax(body, typeflag) + header(b"a") + END)


def test_pax_bad_values() -> None:
    """C26: numbers that are none, and NULs in names, are refused."""
    for record in (
        {b"uid": b"x"}, {b"gid": b"-1"}, {b"size": b"1e3"}, {b"mtime": b"now"},
        {b"path": b"a\0b"}, {b"linkpath": b"\0"},
    ):  # fmt: skip
        with pytest.raises(Rejected):
            headers(pax(record) + header(b"a", b"2", link=b"t") + END)


def test_extension_caps() -> None:
    """C26, C28: a pax header of 1 GB, long names over 1 MiB and endless chains are refused."""
    for typeflag in (b"x", b"g", b"L", b"K"):
        with pytest.raises(LimitExceeded):
            headers(header(b"p", typeflag, size=1 << 30))
    with pytest.raises(LimitExceeded, match="follows"):
        headers(gnu_long(b"n") * 100 + header(b"a") + END)
    assert only(gnu_long(b"first") + gnu_long(b"second") + header(b"a") + END).path == b"second"
    with pytest.raises(Rejected, match="has no member"):
        headers(header(b"a") + gnu_long(b"n") + END)
    with pytest.raises(Rejected, match="has no member"):
        headers(header(b"a") + pax({b"path": b"x"}))


def test_gnu_long_names() -> None:
    """C28: GNU long names and links describe the next member alone; pax wins over them."""
    layer = gnu_long(b"l" * 200) + gnu_long(b"t" * 300, b"K") + header(b"x", b"2", link=b"y")
    first, second = headers(layer + header(b"z") + END)
    assert (first.path, first.link, second.path) == (b"l" * 200, b"t" * 300, b"z")
    mixed = gnu_long(b"gnu") + pax({b"path": b"pax"}) + header(b"x") + END
    assert only(mixed).path == b"pax"


def test_global_headers_are_ignored() -> None:
    """C27: global pax headers change nothing; SCHILY.dev and its like are ignored."""
    layer = pax({b"path": b"evil", b"mtime": b"1"}, b"g") + header(b"a", mtime=7) + END
    assert (only(layer).path, only(layer).mtime) == (b"a", 7)
    assert only(pax({b"SCHILY.dev": b"5", b"SCHILY.ino": b"7"}) + header(b"a") + END).path == b"a"


def gnu_sparse(segments: list[tuple[int, int]], data: bytes, real: int, rest: bytes = b"") -> bytes:
    slots = b"".join(b"%011o\0%011o\0" % segment for segment in segments[:4])
    patch = {386: slots, 482: b"\1" if segments[4:] else b"\0", 483: b"%011o\0" % real}
    block = header(b"s", b"S", size=len(data), magic=b"ustar  \0", patch=patch)
    segments = segments[4:]
    while segments:
        slots = b"".join(b"%011o\0%011o\0" % segment for segment in segments[:21])
        segments = segments[21:]
        block += slots.ljust(504, b"\0") + (b"\1" if segments else b"\0") + bytes(7)
    return block + padded(data) + rest + END


def test_gnu_sparse() -> None:
    """C29: type S, with and without extension blocks, is expanded; holes are zeros."""
    assert content(gnu_sparse([(2, 3), (10, 1)], b"abcd", 12)) == b"\0\0abc\0\0\0\0\0d\0"
    many = [(4 * i, 1) for i in range(100)]
    assert content(gnu_sparse(many, b"x" * 100, 400)) == b"x\0\0\0" * 100
    assert content(gnu_sparse([(0, 0), (9, 0)], b"", 9)) == bytes(9)
    tail = gnu_sparse(many, b"x" * 100, 400, header(b"next"))
    assert [item.path for item in headers(tail)] == [b"s", b"next"]


@pytest.mark.parametrize(
    ("segments", "data", "real"),
    [
        ([(0, 3), (2, 2)], b"abcde", 9),
        ([(5, 1), (1, 1)], b"ab", 9),
        ([(0, 3)], b"ab", 9),
        ([(0, 3)], b"abcd", 9),
        ([(8, 2)], b"ab", 9),
        ([], b"", 1 << 33 << 3),
    ],
)
def test_bad_sparse_maps(segments: list[tuple[int, int]], data: bytes, real: int) -> None:
    """C29: maps that overlap, descend, lie about the data or pass the end are refused."""
    limits = Limits(logical_bytes=1 << 30)
    with pytest.raises(Rejected):
        headers(gnu_sparse(segments, data, real), limits)


def test_pax_sparse() -> None:
    """C29: the pax forms 0.0, 0.1 and 1.0 are expanded under their real name."""
    expected = b"\0\0abc\0\0\0\0\0d\0"
    base = {b"GNU.sparse.size": b"12", b"GNU.sparse.name": b"real"}
    old = [
        *base.items(),
        (b"GNU.sparse.numblocks", b"2"),
        (b"GNU.sparse.offset", b"2"), (b"GNU.sparse.numbytes", b"3"),
        (b"GNU.sparse.offset", b"10"), (b"GNU.sparse.numbytes", b"1"),
    ]  # fmt: skip
    mapped = {**base, b"GNU.sparse.map": b"2,3,10,1"}
    for records in (old, mapped):
        layer = pax(records) + header(b"GNUSparseFile.0/real", size=4) + padded(b"abcd") + END
        assert flat_listing(layer) == {b"real": expected}
    new = {
        b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0",
        b"GNU.sparse.name": b"real", b"GNU.sparse.realsize": b"12",
    }  # fmt: skip
    data = padded(b"2\n2\n3\n10\n1\n") + padded(b"abcd")
    layer = pax(new) + header(b"x", size=512 + 4) + data + header(b"z") + END
    assert flat_listing(layer) == {b"real": expected, b"z": b""}
    for bad in (b"x\n", b"3\n1\n", b"99999999\n", b"1\n-1\n5\n", b"9" * 200):
        with pytest.raises(Rejected):
            headers(pax(new) + header(b"x", size=512 + 4) + padded(bad) + padded(b"abcd") + END)
    for bad in (b"1", b"a,b", b"1,2,3", b"5,9,1,1"):
        with pytest.raises(Rejected):
            headers(pax({**base, b"GNU.sparse.map": bad}) + header(b"x", size=4) + bytes(512) + END)
    with pytest.raises(Rejected, match="form"):
        headers(pax({**new, b"GNU.sparse.major": b"2"}) + header(b"x", size=4) + bytes(512) + END)


def test_exabyte_of_holes() -> None:
    """C29, C36: the logical size counts: 1 EiB or 1 TB of holes is over the quota."""
    for real in (1 << 60, 10**12):
        records = {b"GNU.sparse.size": b"%d" % real, b"GNU.sparse.map": b"0,4"}
        with pytest.raises(LimitExceeded):
            headers(pax(records) + header(b"x", size=4) + bytes(512) + END)
    many = TarLayer()
    for number in range(5):
        many.raw(pax({b"GNU.sparse.size": b"%d" % (120 << 30), b"GNU.sparse.map": b"0,4"}))
        many.raw(header(b"x%d" % number, size=4) + bytes(512))
    with pytest.raises(LimitExceeded, match="holes included"):
        table_of(many.bytes())


def test_types() -> None:
    """C30: devices up to Linux's numbers, fifos and contiguous files are kept; a volume label is
    skipped, a dump directory is a directory; unknown types and multi-volume parts are refused."""
    layer = (
        TarLayer()
        .device(b"c", b"3", 4095, 1048575)
        .device(b"b", b"4", 8, 1)
        .fifo(b"p")
        .member(b"contiguous", b"7", b"data")
        .member(b"old", b"\0", b"data", magic=bytes(8))
        .member(b"olddir/", b"\0", magic=bytes(8))
        .member(b"label", b"V")
        .member(b"dump/", b"D", b"Yname\0\0")
    )
    table = table_of(layer.bytes())
    found = {path: table.kind(i) for i, path in enumerate(table.paths(), -1) if path}
    assert found == {
        b"b": kinds.BLOCK_DEVICE, b"c": kinds.CHARACTER, b"contiguous": kinds.REGULAR,
        b"dump": kinds.DIRECTORY, b"old": kinds.REGULAR, b"olddir": kinds.DIRECTORY,
        b"p": kinds.FIFO,
    }  # fmt: skip
    assert table.extra[1] == kinds.device_number(4095, 1048575)
    for major, minor in ((4096, 0), (0, 1048576), (-1, 0)):
        with pytest.raises(Rejected, match="device number"):
            headers(header(b"c", b"3", major=major, minor=minor) + END)
    for typeflag in (b"Z", b"M", b"8", b"A", b"\xff"):
        with pytest.raises(Rejected, match="unknown type"):
            headers(header(b"x", typeflag) + END)


def test_modes() -> None:
    """C31: set-id and sticky bits are kept; bits above 07777 are cut off."""
    for given, kept in ((0o7777, 0o7777), (0o177777, 0o7777), (0o104755, 0o4755)):
        assert only(header(b"a", mode=given) + END).mode == kept


@pytest.mark.parametrize(
    ("owner", "is_good"),
    [(0, True), (2**21, True), (2**31, True), (2**32 - 2, True),
     (2**32 - 1, False), (2**32, False), (-1, False), (2**55, False)],
)  # fmt: skip
def test_owners(owner: int, is_good: bool) -> None:
    """C32: owners up to 2^32-2 in any encoding; 2^32-1 (no owner), more and negative refused."""
    layers = [header(b"a", uid=owner) + END, header(b"a", gid=owner) + END]
    if owner >= 0:
        layers.append(pax({b"uid": b"%d" % owner}) + header(b"a") + END)
    for layer in layers:
        if is_good:
            assert max(only(layer).uid, only(layer).gid) == owner
        else:
            with pytest.raises(Rejected, match="owner"):
                headers(layer)


def test_times() -> None:
    """C33: negative, far, fractional times are exact to the nanosecond (rounded down), or clamped
    to 64 bits; text is refused."""
    for field, seconds in ((-1, -1), (1 << 33, 1 << 33), (1 << 70, (1 << 63) - 1)):
        item = only(header(b"a", mtime=field) + END)
        assert (item.mtime, item.mtime_ns) == (seconds, 0)
    for text, expected in (
        (b"1.5", (1, 500_000_000)), (b"-1.5", (-2, 500_000_000)), (b"-1", (-1, 0)),
        (b"7.1234567899", (7, 123_456_789)), (b"-7.1234567891", (-8, 876_543_210)),
        (b"9.", (9, 0)), (b"-0.000000001", (-1, 999_999_999)), (b"-0", (0, 0)),
        (b"9223372036854775808", ((1 << 63) - 1, 999_999_999)),
        (b"-99999999999999999999", (-(1 << 63), 0)),
    ):  # fmt: skip
        item = only(pax({b"mtime": text}) + header(b"a") + END)
        assert (item.mtime, item.mtime_ns) == expected, text
    for text in (b"NaN", b"inf", b"1e9", b"", b".5", b"0x10", b"1.5s", b"--1"):
        if text:
            with pytest.raises(Rejected, match="no time"):
                headers(pax({b"mtime": text}) + header(b"a") + END)


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


GOOD_ACL = acl((1, 7, 0xFFFFFFFF), (2, 5, 70000), (4, 5, 0xFFFFFFFF), (16, 5, 0xFFFFFFFF),
               (32, 4, 0xFFFFFFFF))  # fmt: skip


def xattrs_of(xattrs: dict[bytes, bytes], typeflag: bytes = b"0") -> dict[bytes, bytes]:
    layer = TarLayer().member(b"f", typeflag, link=b"t" if typeflag == b"2" else b"", xattrs=xattrs)
    return dict(only(layer.bytes()).xattrs)


def test_xattrs_kept_and_dropped() -> None:
    """C34: the table of xattrs.py: what is kept on which kind of file, byte for byte."""
    capability = b"\1\0\0\2\0\4\0\0" + bytes(12)
    kept = {
        b"security.capability": capability,
        b"user.empty": b"",
        b"user.overlay.origin": b"",
        b"user.binary=\xff": b"\0\n=\xff",
        b"trusted.own": b"t",
        b"system.posix_acl_access": GOOD_ACL,
    }
    dropped = {
        b"trusted.overlay.opaque": b"y",
        b"nonamespace": b"1",
        b"system.nfs4_acl": b"1",
        b"btrfs.compression": b"zstd",
        b"user.": b"nameless",
    }
    encoded = {name.replace(b"=", b"%3D"): value for name, value in (kept | dropped).items()}
    assert xattrs_of(encoded) == kept
    both = {b"system.posix_acl_default": GOOD_ACL, b"user.x": b"1", b"security.y": b"2"}
    assert xattrs_of(both, b"5") == both
    assert xattrs_of(both, b"0") == {b"user.x": b"1", b"security.y": b"2"}
    assert xattrs_of(both, b"2") == {b"security.y": b"2"}
    assert xattrs_of(both, b"6") == {b"security.y": b"2"}


def test_xattr_limits() -> None:
    """C34: a value over 65,535 bytes, too many attributes or too long a name name their path."""
    assert len(xattrs_of({b"user.big": b"v" * 65535})[b"user.big"]) == 65535
    thousand = {b"user.%d" % i: b"v" for i in range(1000)}
    assert len(xattrs_of(thousand)) == 1000
    for bad in (
        {b"user.big": b"v" * 65537},
        {b"user.%d" % i: b"v" for i in range(1025)},
        {b"user." + b"n" * 251: b""},
        {b"user.%d" % i: b"v" * 60_000 for i in range(3)},
    ):
        with pytest.raises(LimitExceeded, match="'f'"):
            xattrs_of(bad)


@pytest.mark.parametrize(
    "value",
    [b"", b"\2\0\0", b"\1\0\0\0" + GOOD_ACL[4:], GOOD_ACL + b"x", GOOD_ACL[:12],
     acl((1, 8, 0), (4, 5, 0), (32, 4, 0)), acl((1, 7, 0), (2, 5, 7), (4, 5, 0), (32, 4, 0)),
     acl((4, 5, 0), (1, 7, 0), (32, 4, 0)), acl((1, 7, 0), (64, 1, 0), (4, 5, 0), (32, 4, 0))],
)  # fmt: skip
def test_bad_acls(value: bytes) -> None:
    """C34: a POSIX ACL that the kernel would not take is refused, with its path."""
    with pytest.raises(Rejected, match=r"'f'.*no POSIX ACL"):
        xattrs_of({b"system.posix_acl_access": value})


def test_empty_acl_means_none() -> None:
    """C34: an ACL without entries is how Linux removes one: it is dropped."""
    assert xattrs_of({b"system.posix_acl_access": acl()}) == {}


@pytest.mark.parametrize(
    "blob",
    [b"PK\3\4" + b"zip" * 400, b"\x7fELF" + bytes(range(256)) * 8, b"<!DOCTYPE html>" * 99,
     bytes(range(256)) * 100, b"x", gzip.compress(b"<html>no tar</html>" * 50, mtime=0)],
    ids=["zip", "elf", "html", "any", "short", "gzip"],
)  # fmt: skip
def test_not_a_tar(blob: bytes) -> None:
    """C37: what is no tar is refused at its first block."""
    with pytest.raises(Rejected):
        headers(blob)


def test_empty_layers() -> None:
    """C38: a layer of no bytes, of end blocks only, and docker's empty layer are empty tables."""
    for blob in (b"", END, gzip.compress(b""), gzip.compress(bytes(1024)), bytes(512), bytes(99)):
        table = table_of(blob)
        assert (table.entry_count, table.inode_count) == (1, 0)
        assert list(table.paths()) == [b""]


def test_prefix_and_star_and_v7() -> None:
    """C6: the name prefix counts in ustar, is shorter in star, and is none in GNU and V7."""
    assert only(header(b"name", prefix=b"dir") + END).path == b"dir/name"
    assert only(header(b"name", magic=b"ustar  \0", prefix=b"dir") + END).path == b"name"
    assert only(header(b"name", magic=bytes(8), prefix=b"dir") + END).path == b"name"
    star = header(b"name", prefix=b"dir".ljust(131, b"\0") + b"time", patch={508: b"tar\0"})
    assert only(star + END).path == b"dir/name"
