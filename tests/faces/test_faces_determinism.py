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
from imagecache.faces.plan import FIRST_WINDOW_BLOCKS, plan_disk

ROOT = Path(__file__).parents[2]
PROGRAM = """
import hashlib
from kits.layersdisk import flatten
from kits.layersfixtures import every_kind, large_directories, two_versions
from imagecache.faces.erofs import write_erofs
tree, _ = flatten(every_kind().bytes(), large_directories().bytes(), *two_versions())
print(hashlib.sha256(b"".join(write_erofs(tree).sections)).hexdigest())
"""
GOLDEN = "e30759b09f5cd3611d61aa492233e7e55fbb9d39bc21c4d891302b6abf0fdefc"


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
        digests.add(done.stdout.decode().strip())
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
