"""D7: equal trees give equal bytes, in any process and environment, and layers keep theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kits.layersdisk import flatten
from kits.layersfixtures import every_kind, two_versions
from kits.tarlayer import TarLayer

from imagecache.errors import LimitExceeded
from imagecache.faces.crc32c import crc32c
from imagecache.faces.erofs import write_erofs
from imagecache.faces.plan import FIRST_WINDOW_BLOCKS, MetadataRegion, plan_disk

ROOT = Path(__file__).parents[2]
PROGRAM = """
import hashlib
from kits.layersdisk import flatten
from kits.layersfixtures import every_kind, large_directories, two_versions
from imagecache.faces.erofs import write_erofs
from imagecache.faces.ext4 import write_ext4
tree, _ = flatten(every_kind().bytes(), large_directories().bytes(), *two_versions())
for region in (write_erofs(tree), write_ext4(tree, free_blocks=100)):
    print(hashlib.sha256(b"".join(region.sections)).hexdigest())
"""
GOLDEN = (
    "dc6f7f7c51542afd3b26301bf42851567de32cb5bc438cd0077fb9e48497a3ad",  # EROFS
    "6391dfcf61e45f3b089aa1c520533ea468c09c8c508822b1b36658b1075c4926",  # ext4
)


def test_two_processes_in_different_environments() -> None:
    """D7: hash seed, time zone, locale, umask and place do not reach a byte."""
    digests = set()
    for seed, zone, locale, umask in (("1", "UTC", "C", 0o022), ("77", "Asia/Tokyo", "de_DE", 0o7)):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={"PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": locale, "LANG": locale,
                 "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": os.environ["PATH"]},
            preexec_fn=lambda umask=umask: os.umask(umask),
            cwd="/", stdout=subprocess.PIPE, check=True,
        )  # fmt: skip
        digests.add(tuple(done.stdout.decode().split()))
    assert digests == {GOLDEN}


@pytest.mark.quick
def test_lower_layers_keep_their_section() -> None:
    """Seam of 3.1: another top layer leaves the sections below it, and their regions, as they
    were, whether it hides, replaces or adds files."""
    base = every_kind().bytes()
    top = TarLayer().opaque(b"names").whiteout(b"sizes").file(b"new", b"x").file(b"times", b"y")
    one, two = (
        write_erofs(flatten(*layers)[0])
        for layers in ([base, *two_versions()], [base, two_versions()[0], top.bytes()])
    )
    assert one.sections[1] == two.sections[1]
    assert one.plan.layer_start_blocks[:2] == two.plan.layer_start_blocks[:2]
    assert one.sections[0] != two.sections[0]


def changed_blocks(a: MetadataRegion, b: MetadataRegion) -> int:
    """Blocks of the directory section that differ and are not empty."""
    one, two = a.sections[-1], b.sections[-1]
    ends = range(0, max(len(one), len(two)), 4096)
    pairs = [(one[at : at + 4096], two[at : at + 4096]) for at in ends]
    return sum(x != y and bool(y.strip(b"\0")) for x, y in pairs)


@pytest.mark.quick
def test_upper_layers_move_few_directories() -> None:
    """Seam of 3.1: a new top layer rewrites the directories that it touches and their children's
    "..", not the rest: new directories, a file in a lower layer's directory, a hidden file."""
    base = TarLayer()
    for outer in range(60):
        for inner in range(20):
            for number in range(8):
                base.file(b"d%02d/s%02d/file-%d" % (outer, inner, number))
    middle = TarLayer().file(b"d05/s01/more").file(b"app/x")
    layers = [base.bytes(), middle.bytes()]

    def region(top: TarLayer) -> MetadataRegion:
        return write_erofs(flatten(*layers, top.bytes())[0])

    plain = region(TarLayer().file(b"top/a"))
    total = len(plain.sections[-1]) // 4096
    assert total > 80
    many = TarLayer().file(b"top/a")
    for number in range(30):
        many.file(b"top/new-%d/x" % number)
    for top in (
        TarLayer().file(b"top/a").file(b"top/b"),
        many,
        TarLayer().file(b"top/a").file(b"d07/s03/new"),
        TarLayer().file(b"top/a").whiteout(b"d09/s03/file-1"),
        TarLayer().file(b"top/a").directory(b"d11/s04", mode=0o700),
        TarLayer().file(b"top/a").file(b"d05/s01/again"),
    ):
        assert changed_blocks(plain, region(top)) <= 8


@pytest.mark.quick
def test_links_change_a_section_only_where_they_change() -> None:
    """An upper layer that takes one of two names changes that inode's count, nothing else."""
    base = TarLayer().file(b"a", b"x").hardlink(b"b", b"a").file(b"c", b"y").bytes()
    alone = write_erofs(flatten(base)[0]).sections[1]
    hidden = write_erofs(flatten(base, TarLayer().whiteout(b"a").bytes())[0]).sections[1]
    assert sum(x != y for x, y in zip(alone, hidden, strict=True)) == 1


@pytest.mark.quick
def test_plan() -> None:
    """The window is 64 MiB, doubled until the metadata fits; regions start at 2 MiB steps."""
    assert plan_disk(1, []).disk_blocks == FIRST_WINDOW_BLOCKS == 16384
    plan = plan_disk(16384, [1, 0, 513])
    assert (plan.window_blocks, plan.layer_start_blocks) == (16384, (16384, 16896, 16896))
    assert plan.disk_blocks == 16896 + 513
    assert plan_disk(16385, []).window_blocks == 32768
    with pytest.raises(LimitExceeded):
        plan_disk(1, [1 << 32])


@pytest.mark.quick
def test_crc32c() -> None:
    """RFC 3720 B.4's vectors, whose results are inverted at the end."""
    assert crc32c(bytes(32)) ^ 0xFFFFFFFF == 0x8A9136AA
    assert crc32c(b"\xff" * 32) ^ 0xFFFFFFFF == 0x62A8AB43
    assert crc32c(bytes(range(32))) ^ 0xFFFFFFFF == 0x46DD794E


@pytest.mark.quick
def test_uuid_follows_content() -> None:
    """Another content, another uuid; the same content, the same."""
    trees = [flatten(TarLayer().file(b"a", data).bytes())[0] for data in (b"1", b"1", b"22")]
    uuids = [write_erofs(tree).sections[0][1024 + 48 : 1024 + 64] for tree in trees]
    assert uuids[0] == uuids[1] != uuids[2]
