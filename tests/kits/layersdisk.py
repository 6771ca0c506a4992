"""From layer bytes to tables, trees and disk files, in memory; and kernel mounts of the result."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from imagecache.faces.plan import MetadataRegion
from imagecache.flatten import kinds
from imagecache.flatten.builder import FileTableBuilder
from imagecache.flatten.decompress import open_layer
from imagecache.flatten.filetable import FileTable, region_layout
from imagecache.flatten.limits import Limits
from imagecache.flatten.tar import members
from imagecache.flatten.tree import Tree, merge

LIMITS = Limits()
BLOCK = 4096
COMPARE = Path(__file__).parents[2] / "tools" / "compare_trees.py"
Contents = dict[int, list[tuple[int, bytes]]]


def parse(layer: bytes, limits: Limits = LIMITS) -> tuple[FileTable, Contents]:
    """The file table of one layer, and its files' pieces by content id."""
    builder = FileTableBuilder(limits)
    contents: Contents = {}
    for number, member in enumerate(members(open_layer(io.BytesIO(layer), limits), limits)):
        if builder.add(member.header, number):
            contents[number] = list(member.pieces())
    table = builder.finish()
    return table, contents


def table_of(layer: bytes, limits: Limits = LIMITS) -> FileTable:
    return parse(layer, limits)[0]


def flatten(*layers: bytes) -> tuple[Tree, list[Contents]]:
    """The merged tree of layers from the bottom up, with contents per layer."""
    parsed = [parse(layer) for layer in layers]
    tables = [table for table, _ in parsed]
    for table in tables:
        encoded = table.encode()
        assert FileTable.decode(encoded, LIMITS).encode() == encoded
    return merge(tables), [contents for _, contents in parsed]


def read_file(tree: Tree, contents: Sequence[Contents], path: bytes) -> bytes:
    """The content of a regular file of the merged tree."""
    node = tree.lookup(path)
    assert node is not None and node.kind == kinds.REGULAR, path
    table = tree.tables[node.layer]
    data = bytearray(table.size[node.inode])
    for offset, piece in contents[node.layer].get(table.contents[node.inode], []):
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def listing(tree: Tree, contents: Sequence[Contents]) -> dict[bytes, object]:
    """A small picture of the tree: path -> content, "->" target, kind, or "/" for directories."""
    result: dict[bytes, object] = {}
    for path, node in tree.walk():
        if node.kind == kinds.DIRECTORY:
            result[path] = "/"
        elif node.kind == kinds.REGULAR:
            result[path] = read_file(tree, contents, path)
        elif node.kind == kinds.SYMLINK:
            result[path] = b"-> " + tree.tables[node.layer].target(node.inode)
        else:
            result[path] = node.kind
    return result


def flat_listing(*layers: bytes) -> dict[bytes, object]:
    """`listing` of layers, without the root."""
    result = listing(*flatten(*layers))
    assert result.pop(b"") == "/"
    return result


def write_disk(
    target: Path, region: MetadataRegion, tree: Tree, contents: Sequence[Contents]
) -> None:
    """The whole virtual disk as a sparse file."""
    with target.open("wb") as disk:
        disk.truncate(region.plan.disk_blocks * BLOCK)
        for section in region.sections:
            assert len(section) % BLOCK == 0
            disk.write(section)
        assert disk.tell() == region.total_blocks * BLOCK
        starts = region.plan.layer_start_blocks
        for table, pieces, start in zip(tree.tables, contents, starts, strict=True):
            layout = region_layout(table)
            for inode, block in zip(layout.inodes, layout.start_blocks, strict=True):
                for offset, piece in pieces[table.contents[inode]]:
                    disk.seek((start + block) * BLOCK + offset)
                    disk.write(piece)


def run(*command: object, ok: Sequence[int] = (0,)) -> str:
    """Run a program; its output. Fails the test on any other status."""
    done = subprocess.run(
        [str(part) if not isinstance(part, bytes) else part for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = done.stdout.decode(errors="replace")
    assert done.returncode in ok, f"{command} -> {done.returncode}: {output}"
    return output


@contextlib.contextmanager
def mounted(source: object, target: Path, fs_type: str, options: str = "loop,ro") -> Iterator[Path]:
    """A kernel mount for the length of a with block."""
    target.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", fs_type, "-o", options, source, target)
    try:
        yield target
    finally:
        run("umount", target)


def differences(a: Path, b: Path, *options: str) -> str:
    """What compare_trees prints; "" where the trees are equal."""
    return run(sys.executable, COMPARE, *options, a, b, ok=(0, 1))
