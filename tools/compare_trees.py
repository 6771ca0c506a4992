#!/usr/bin/env python3
"""Compare two directory trees attribute by attribute: `compare_trees.py A B`.

Prints one line for each difference and exits 1; prints nothing and exits 0 where the trees are
equal. Exits 2 where a tree cannot be read. Imports nothing of cubecache: an independent judge.

Compared: names, type, mode, uid, gid, size, content (sha256), symlink target, device number, mtime
in nanoseconds, extended attributes, hard-link groups; with --holes also where files have data (in
blocks of 4096 bytes). Not compared: atime, ctime, inode numbers, and what the kernel invents for
directories (size, link count).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PRIVATE_XATTRS = (b"trusted.overlay.",)  # overlayfs's own notes on its layers
BLOCK = 4096

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True)
class Options:
    """What to leave out or take in."""

    holes: bool
    mtimes: bool
    directory_mtimes: bool
    xattrs: bool
    ignored_xattrs: tuple[bytes, ...]


def shown(name: bytes) -> str:
    """A name with all but printable ASCII escaped."""
    return repr(name)[2:-1]


def scan(root: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Every (path below root, lstat), the root as b"."."""
    stack = [b""]
    while stack:
        path = stack.pop()
        full = root + b"/" + path if path else root
        status = os.lstat(full)
        yield path or b".", status
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(full) as entries:
                stack.extend(path + b"/" + entry.name if path else entry.name for entry in entries)


def xattrs_of(path: bytes, options: Options) -> dict[bytes, bytes]:
    """All attributes that root sees, but for overlayfs's own and the ignored ones."""
    found: dict[bytes, bytes] = {}
    for name in os.listxattr(path, follow_symlinks=False):
        key = os.fsencode(name)
        if not key.startswith(PRIVATE_XATTRS + options.ignored_xattrs):
            found[key] = os.getxattr(path, name, follow_symlinks=False)
    return found


def digest_of(path: bytes) -> str:
    """sha256 of a file's content."""
    with Path(os.fsdecode(path)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_map(path: bytes, size: int) -> list[tuple[int, int]]:
    """Whole blocks of the file that hold any byte but zero, as (start, end) runs."""
    runs: list[tuple[int, int]] = []
    zero = bytes(BLOCK)
    with Path(os.fsdecode(path)).open("rb") as file:
        descriptor = file.fileno()
        at = 0
        while at < size:
            try:
                at = os.lseek(descriptor, at, os.SEEK_DATA) // BLOCK * BLOCK
            except OSError:
                break
            end = os.lseek(descriptor, at, os.SEEK_HOLE)
            while at < end:
                block = os.pread(descriptor, BLOCK, at)
                if block != zero[: len(block)]:
                    if runs and runs[-1][1] == at:
                        runs[-1] = (runs[-1][0], at + BLOCK)
                    else:
                        runs.append((at, at + BLOCK))
                at += BLOCK
    return runs


def groups_of(entries: dict[bytes, os.stat_result]) -> dict[bytes, frozenset[bytes]]:
    """The set of names that share each non-directory's inode, by name."""
    by_inode: dict[tuple[int, int], set[bytes]] = {}
    for path, status in entries.items():
        if not stat.S_ISDIR(status.st_mode):
            by_inode.setdefault((status.st_dev, status.st_ino), set()).add(path)
    groups: dict[bytes, frozenset[bytes]] = {}
    for names in by_inode.values():
        group = frozenset(names)
        for path in names:
            groups[path] = group
    return groups


def compare_entry(
    path: bytes, roots: tuple[bytes, bytes], pair: tuple[os.stat_result, os.stat_result], o: Options
) -> Iterator[str]:
    """Differences of one path that both trees have."""
    a, b = pair
    kinds = [TYPES.get(stat.S_IFMT(status.st_mode), "?") for status in pair]
    if kinds[0] != kinds[1]:
        yield f"type: {kinds[0]} / {kinds[1]}"
        return
    is_directory = stat.S_ISDIR(a.st_mode)
    if stat.S_IMODE(a.st_mode) != stat.S_IMODE(b.st_mode):
        yield f"mode: {stat.S_IMODE(a.st_mode):04o} / {stat.S_IMODE(b.st_mode):04o}"
    if a.st_uid != b.st_uid:
        yield f"uid: {a.st_uid} / {b.st_uid}"
    if a.st_gid != b.st_gid:
        yield f"gid: {a.st_gid} / {b.st_gid}"
    if o.mtimes and (o.directory_mtimes or not is_directory) and a.st_mtime_ns != b.st_mtime_ns:
        yield f"mtime: {a.st_mtime_ns} / {b.st_mtime_ns}"
    full = tuple(root + b"/" + path if path != b"." else root for root in roots)
    if o.xattrs:
        xattrs = [xattrs_of(name, o) for name in full]
        for name in sorted(xattrs[0].keys() | xattrs[1].keys()):
            values = [found.get(name) for found in xattrs]
            if values[0] != values[1]:
                yield f"xattr {shown(name)}: {values[0]!r} / {values[1]!r}"
    if stat.S_ISREG(a.st_mode):
        if a.st_size != b.st_size:
            yield f"size: {a.st_size} / {b.st_size}"
            return
        digests = [digest_of(name) for name in full]
        if digests[0] != digests[1]:
            yield f"content: {digests[0]} / {digests[1]}"
        elif o.holes:
            allocated = [status.st_blocks * 512 for status in pair]
            maps = [data_map(name, a.st_size) for name in full]
            if maps[0] != maps[1]:
                yield f"holes: data at {maps[0]} / {maps[1]}"
            full_size = -(-a.st_size // BLOCK) * BLOCK
            if (allocated[0] < full_size) != (allocated[1] < full_size):
                yield f"holes: {allocated[0]} / {allocated[1]} bytes allocated of {full_size}"
    elif stat.S_ISLNK(a.st_mode):
        targets = [os.readlink(name) for name in full]  # noqa: PTH115 - names are bytes
        if targets[0] != targets[1]:
            yield f"target: {shown(targets[0])} / {shown(targets[1])}"
    elif stat.S_ISCHR(a.st_mode) or stat.S_ISBLK(a.st_mode):
        numbers = [f"{os.major(s.st_rdev)}:{os.minor(s.st_rdev)}" for s in pair]
        if numbers[0] != numbers[1]:
            yield f"device: {numbers[0]} / {numbers[1]}"


def compare(roots: tuple[bytes, bytes], options: Options, skip: frozenset[bytes]) -> Iterator[str]:
    """All differences, as lines, in bytewise path order."""
    trees = [
        {
            path: status
            for path, status in scan(root)
            if not any(path == name or path.startswith(name + b"/") for name in skip)
        }
        for root in roots
    ]
    groups = [groups_of(tree) for tree in trees]
    for path in sorted(trees[0].keys() | trees[1].keys()):
        a, b = trees[0].get(path), trees[1].get(path)
        if a is None or b is None:
            yield f"{shown(path)}: only in {'B' if a is None else 'A'}"
            continue
        for difference in compare_entry(path, roots, (a, b), options):
            yield f"{shown(path)}: {difference}"
        sides = [group.get(path, frozenset()) for group in groups]
        if sides[0] != sides[1]:
            names = [" ".join(shown(name) for name in sorted(side)) for side in sides]
            yield f"{shown(path)}: links: {names[0]} / {names[1]}"


def main() -> int:
    """The command: 0 equal, 1 different, 2 cannot tell."""
    parser = argparse.ArgumentParser(description="Compare two directory trees by every attribute.")
    parser.add_argument("a", metavar="A", type=os.fsencode)
    parser.add_argument("b", metavar="B", type=os.fsencode)
    parser.add_argument("--holes", action="store_true", help="compare holes too")
    parser.add_argument("--no-mtimes", action="store_true", help="ignore modification times")
    parser.add_argument(
        "--no-directory-mtimes", action="store_true", help="ignore those of directories"
    )
    parser.add_argument("--no-xattrs", action="store_true", help="ignore extended attributes")
    parser.add_argument(
        "--ignore-xattr", action="append", default=[], type=os.fsencode, metavar="PREFIX"
    )
    parser.add_argument(
        "--skip", action="append", default=[], type=os.fsencode, metavar="PATH",
        help="leave out a path and all below it",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=200, help="stop after so many differences")
    arguments = parser.parse_args()
    options = Options(
        holes=arguments.holes,
        mtimes=not arguments.no_mtimes,
        directory_mtimes=not arguments.no_directory_mtimes,
        xattrs=not arguments.no_xattrs,
        ignored_xattrs=tuple(arguments.ignore_xattr),
    )
    count = 0
    try:
        for line in compare((arguments.a, arguments.b), options, frozenset(arguments.skip)):
            count += 1
            print(line)
            if count >= arguments.limit:
                print(f"... stopped after {count} differences")
                break
    except OSError as error:
        print(f"compare_trees: {error}", file=sys.stderr)
        return 2
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
