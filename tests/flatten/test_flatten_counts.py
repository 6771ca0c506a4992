"""The big counts: rows C4, C24 and section 3 at full size."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kits.layersdisk import LIMITS, mounted, run, table_of, write_disk
from kits.tarlayer import END, header

from imagecache.errors import LimitExceeded
from imagecache.faces.erofs import write_erofs
from imagecache.flatten.builder import FileTableBuilder
from imagecache.flatten.decompress import open_layer
from imagecache.flatten.filetable import FileTable
from imagecache.flatten.limits import Limits
from imagecache.flatten.tar import members
from imagecache.flatten.tree import merge

ROOT = Path(__file__).parents[2]


class Repeated(io.RawIOBase):
    """A stream of numbered headers, made as they are read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.number = 0

    def read(self, size: int = -1) -> bytes:
        parts = []
        while len(parts) < 512 and self.number < self.count:
            parts.append(header(b"dir/f%07d" % self.number))
            self.number += 1
        return b"".join(parts)


@pytest.mark.soak
def test_a_million_entries_in_one_directory(tmp_path: Path) -> None:
    """C24, section 3: 10^6 names in one directory build, encode and mount."""
    builder = FileTableBuilder(LIMITS)
    for member in members(open_layer(Repeated(1_000_000), LIMITS), LIMITS):
        builder.add(member.header, 0)
    table = builder.finish()
    assert table.entry_count == 1_000_002
    again = FileTable.decode(table.encode(), LIMITS)
    tree = merge([again])
    disk = tmp_path / "disk"
    write_disk(disk, write_erofs(tree), tree, [{}])
    run("fsck.erofs", disk)
    with mounted(disk, tmp_path / "erofs", "erofs") as ours:
        assert sum(1 for _ in (ours / "dir").iterdir()) == 1_000_000
        assert (ours / "dir" / "f0777777").is_file()


def peak_of(program: str, *arguments: object) -> int:
    """The peak of resident bytes that a fresh process adds while it runs `program`."""
    script = f"""
import io, resource, sys
from imagecache.errors import LimitExceeded
from imagecache.flatten.builder import FileTableBuilder
from imagecache.flatten.decompress import open_layer
from imagecache.flatten.limits import Limits
from imagecache.flatten.tar import members
from kits.tarlayer import header
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{program}
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.soak
def test_ten_gigabytes_of_gzip(tmp_path: Path) -> None:
    """C4: 10 GB from 10 MB: stopped at the first GiB, in little memory."""
    blob = tmp_path / "bomb"
    blob.write_bytes(gzip.compress(bytes(64 << 20), 9) * 160)
    program = """
try:
    open_layer(open(sys.argv[1], "rb"), Limits()).drain()
except LimitExceeded:
    pass
else:
    raise SystemExit(1)
"""
    assert peak_of(program, blob) < 32 << 20


@pytest.mark.soak
def test_two_hundred_thousand_files_are_small(tmp_path: Path) -> None:
    """A table of 200,000 files takes well under 150 MB while it is built."""
    layer = tmp_path / "layer"
    with layer.open("wb") as file:
        for number in range(200_000):
            file.write(header(b"usr/lib/dir%04d/name-of-file-%07d" % (number // 100, number)))
    program = """
builder = FileTableBuilder(Limits())
for member in members(open_layer(open(sys.argv[1], "rb"), Limits()), Limits()):
    builder.add(member.header, 0)
table = builder.finish()
assert table.inode_count == 200_000
"""
    assert peak_of(program, layer) < 120 << 20


def test_entry_limit_is_early() -> None:
    """C24: over the cap the parse stops at that entry."""
    stream = Repeated(10_000)
    with pytest.raises(LimitExceeded):
        for _ in members(open_layer(stream, LIMITS), Limits(entries=1000)):
            pass
    assert stream.number < 2000
    assert table_of(header(b"x") + END).entry_count == 2
