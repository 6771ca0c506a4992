"""Layers that hold what file systems find hard, for every face and its oracles."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kits.tarlayer import TarLayer, header, padded, pax

ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in (
        (1, 7, 0xFFFFFFFF), (2, 5, 70000), (4, 5, 0xFFFFFFFF), (8, 4, 2**32 - 2),
        (16, 5, 0xFFFFFFFF), (32, 4, 0xFFFFFFFF),
    )
)  # fmt: skip
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
TIMES = (b"0", b"-1", b"-2147483648", b"2147483647.999999999", b"2147483648", b"4294967296.5",
         b"8589934597.000000001", b"-1.25")  # fmt: skip
NAMES = (b"n" * 254, b"n" * 255, b"a\nb", b"\xff\xfe", b"!bang", b"-minus", b"+plus", b" space",
         b"...", b"..x", "\u00e9".encode(), "e\u0301".encode(), b"A", b"a")  # fmt: skip


def every_kind(*, xattr_bytes: int = 2500, far_times: bool = True) -> TarLayer:
    """Every kind of file, owner, mode, time, name and attribute."""
    layer = TarLayer().directory(b".", mode=0o755, records={b"mtime": b"1600000000.25"})
    for size in (0, 1, 4095, 4096, 4097, 8192, 70_000, 1_000_003):
        layer.file(b"sizes/%d" % size, random.Random(size).randbytes(size))
    layer.directory(b"sizes", mode=0o1777, mtime=3)
    for name in NAMES:
        layer.file(b"names/" + name, name)
        layer.directory(b"namedirs/" + name)
    layer.directory(b"names").directory(b"namedirs")
    for length in (1, 30, 59, 60, 61, 100, 255, 1000, 3900, 3967, 3968, 3969, 4031, 4032, 4063,
                   4064, 4094, 4095):  # fmt: skip
        layer.symlink(b"links/%d" % length, (b"t/" * 2048)[:length])
    layer.directory(b"links").file(b"hard/a", b"shared").hardlink(b"hard/b", b"hard/a")
    layer.hardlink(b"other/c", b"hard/a").symlink(b"hard/s", b"x").hardlink(b"hard/t", b"hard/s")
    layer.fifo(b"hard/p").hardlink(b"hard/q", b"hard/p").directory(b"hard").directory(b"other")
    layer.device(b"dev/c", b"3", 4095, 1048575).device(b"dev/b", b"4", 259, 70000)
    layer.device(b"dev/null", b"3", 1, 3).fifo(b"dev/fifo", mode=0o600).directory(b"dev")
    for number, (mode, uid, gid) in enumerate(
        ((0o4755, 70000, 80000), (0o2755, 2**32 - 2, 0), (0o6777, 0, 2**31), (0, 65535, 65536))
    ):
        layer.file(b"owners/%d" % number, b"x", mode=mode, uid=uid, gid=gid)
        layer.directory(b"ownerdirs/%d" % number, mode=mode, uid=uid, gid=gid)
    layer.directory(b"owners").directory(b"ownerdirs")
    times = TIMES if far_times else TIMES[:4]
    for number, text in enumerate(times):
        layer.file(b"times/%d" % number, b"x", records={b"mtime": text})
        layer.directory(b"timedirs/%d" % number, records={b"mtime": text})
        layer.symlink(b"times/l%d" % number, b"x", records={b"mtime": text})
        layer.device(b"times/d%d" % number, b"3", 1, 3, records={b"mtime": text})
    layer.directory(b"times").directory(b"timedirs")
    layer.file(b"x/capability", b"x", xattrs={b"security.capability": CAPABILITY})
    layer.file(b"x/empty", xattrs={b"user.empty": b"", b"user.b": b"\0\n\xff"})
    layer.file(b"x/large", b"x", xattrs={b"user.large": random.Random(1).randbytes(xattr_bytes)})
    layer.file(b"x/name", b"x", xattrs={b"user." + b"n" * 240: b"long name"})
    layer.file(b"x/many", b"x", xattrs={b"user.%d" % i: b"v%d" % i for i in range(60)})
    layer.file(b"x/acl", b"x", mode=0o754, xattrs={b"system.posix_acl_access": ACL})
    acls = {b"system.posix_acl_access": ACL, b"system.posix_acl_default": ACL}
    layer.directory(b"x/acldir", mode=0o754, xattrs=acls)  # the mode that goes with the ACL
    layer.symlink(b"x/symlink", b"t", xattrs={b"trusted.on.link": b"1"})
    layer.device(b"x/device", b"3", 1, 3, xattrs={b"security.on.device": b"1"})
    layer.directory(b"x/dir", xattrs={b"user.on.dir": b"1" * 300, b"trusted.t": b"2"})
    return layer.directory(b"x")


def sparse_layer() -> TarLayer:
    """A 5 MiB file with two islands of data, and one of holes alone."""
    layer = TarLayer().directory(b".")
    size = 5 << 20
    first = {b"GNU.sparse.size": b"%d" % size, b"GNU.sparse.numblocks": b"3"}
    records = {**first, b"GNU.sparse.map": b"512,512,3999744,1024,%d,0" % size}
    data = b"abcd" * 128 + b"z" * 1024  # GNU tar wants segments of whole blocks
    layer.raw(pax(records) + header(b"sparse", size=len(data)) + padded(data))
    empty = {**first, b"GNU.sparse.numblocks": b"1", b"GNU.sparse.map": b"%d,0" % size}
    return layer.raw(pax(empty) + header(b"holes", size=0))


def large_directories() -> TarLayer:
    """Directories of one block, many, names that fill blocks exactly, many subdirectories."""
    layer = TarLayer().directory(b".")
    for number in range(3000):
        layer.file(b"big/file-%d" % number)
    for number in range(300):
        layer.directory(b"subs/%d" % number)
    for number in range(40):
        layer.file(b"exact/" + b"%03d" % number + b"x" * 113, b"e")
    for number in range(200):
        layer.symlink(b"wide/" + b"%03d" % number + b"w" * 250, b"t")
    return layer.directory(b"big").directory(b"subs").directory(b"exact").directory(b"wide")


def two_versions() -> list[bytes]:
    """Three layers that replace, hide and add across each other."""
    lower = (
        TarLayer().directory(b".").directory(b"etc").file(b"etc/keep", b"1").file(b"etc/gone", b"2")
        .directory(b"opt/app", mode=0o700, uid=9).file(b"opt/app/old", b"3").directory(b"opt")
        .symlink(b"lib", b"usr/lib").directory(b"usr").directory(b"usr/lib")
        .file(b"usr/lib/so", b"so" * 5000).file(b"type", b"file")
        .file(b"l1", b"linked").hardlink(b"l2", b"l1").hardlink(b"l3", b"l1")
    )  # fmt: skip
    middle = (
        TarLayer().directory(b".").directory(b"etc", mode=0o711).whiteout(b"etc/gone")
        .directory(b"opt", mtime=5).directory(b"opt/app").opaque(b"opt/app")
        .file(b"opt/app/new", b"4")
        .directory(b"type").file(b"type/x", b"5").whiteout(b"l2")
        .directory(b"usr").directory(b"usr/lib").file(b"usr/lib/so2", b"s2")
    )  # fmt: skip
    upper = (
        TarLayer().directory(b".", mode=0o711).directory(b"lib").file(b"lib/real", b"6")
        .symlink(b"type", b"etc/keep").file(b"l1", b"own")
    )  # fmt: skip
    return [lower.bytes(), middle.bytes(), upper.bytes()]


def debian_layer(paths: Sequence[str]) -> bytes:
    """Real files of this machine, as GNU tar packs them, with entries for all parents."""
    parents = sorted({str(parent) for path in paths for parent in Path(path).parents})
    return subprocess.run(
        ["tar", "-c", "--xattrs", "--xattrs-include=*", "--sort=name", "--format=posix",
         "--pax-option=delete=atime,delete=ctime", "-C", "/", "--numeric-owner",
         "--no-recursion", *parents, "--recursion", *paths],
        stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
