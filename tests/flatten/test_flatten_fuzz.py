"""Mutated layers: the parser ends, and raises our errors only."""

from __future__ import annotations

import gzip
import io

import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kits.layersdisk import LIMITS
from kits.layersfixtures import sparse_layer
from kits.tarlayer import TarLayer, gnu_long, header, pax

from imagecache.errors import Rejected
from imagecache.faces.erofs import write_erofs
from imagecache.flatten.builder import FileTableBuilder
from imagecache.flatten.decompress import open_layer
from imagecache.flatten.filetable import FileTable
from imagecache.flatten.limits import Limits
from imagecache.flatten.tar import members
from imagecache.flatten.tree import merge

SMALL = Limits(entries=2000, logical_bytes=1 << 24, layer_bytes=1 << 24)
SEED = (
    sparse_layer().file(b"a/b", b"content").hardlink(b"l", b"a/b").symlink(b"s", b"a")
    .raw(gnu_long(b"x" * 150)).raw(pax({b"mtime": b"1.5", b"path": b"p" * 120, b"uid": b"7"}))
    .file(b"n", b"1" * 700, xattrs={b"user.x": b"y"}).whiteout(b"w").opaque(b"a")
    .raw(pax({b"comment": b"c"}, b"g")).device(b"d", b"3", 1, 2).directory(b"s")
).bytes()  # fmt: skip


def consume(blob: bytes) -> None:
    """Parse, build, encode, decode, merge and write; `Rejected` ends it well."""
    try:
        builder = FileTableBuilder(SMALL)
        total = 0
        for number, member in enumerate(members(open_layer(io.BytesIO(blob), SMALL), SMALL)):
            if builder.add(member.header, number):
                end = 0
                for offset, piece in member.pieces():
                    assert piece and offset >= end
                    end = offset + len(piece)
                    total += len(piece)
                assert end <= member.header.size
        table = builder.finish()
        encoded = table.encode()
        assert FileTable.decode(encoded, LIMITS).encode() == encoded
        write_erofs(merge([table]))
    except Rejected as error:
        assert str(error).isascii()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255), st.booleans()), max_size=6
    ),
    cut=st.integers(0, len(SEED)),
)
def test_mutated_tar(edits: list[tuple[int, int, bool]], cut: int) -> None:
    """C3, C6, C7, C26, C37: flipped, cut and re-checksummed tars end in a table or `Rejected`."""
    blob = bytearray(SEED)
    for at, value, fix in edits:
        blob[at] = value
        if fix:
            start = at // 512 * 512
            block = blob[start : start + 512]
            block[148:156] = b" " * 8
            blob[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    consume(bytes(blob))
    consume(bytes(blob[:cut]))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 2**16),
    codec=st.sampled_from(["gzip", "zstd"]),
)
def test_mutated_compression(edits: list[tuple[int, int]], cut: int, codec: str) -> None:
    """C2, C3, C5: flipped and cut compressed layers end in a table or `Rejected`."""
    blob = bytearray(gzip.compress(SEED) if codec == "gzip" else zstandard.compress(SEED))
    for at, value in edits:
        blob[at % len(blob)] = value
    consume(bytes(blob))
    consume(bytes(blob[: cut % len(blob)]))


NAMES = st.sampled_from(
    [b"a", b"a/b", b"a/b/c", b"b", b"./a/", b"a/../b", b"c/d", b".wh.a", b"a/.wh.b",
     b".wh..wh..opq", b"a/.wh..wh..opq", b".", b"..", b"s", b"s/x", b"s/a", b"a//b", b"\xff"]
)  # fmt: skip
MEMBERS = st.lists(
    st.tuples(st.sampled_from(b"0123456"), NAMES, NAMES, st.integers(0, 600)), max_size=14
)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(MEMBERS, min_size=1, max_size=3))
def test_random_layers(layers: list[list[tuple[int, bytes, bytes, int]]]) -> None:
    """C9-C22: any mixture of names, links and whiteouts builds, merges and is written, or is
    refused; every live inode has a path and every path an inode."""
    try:
        tables = []
        for items in layers:
            layer = TarLayer()
            for typeflag, name, link, size in items:
                kind = bytes([typeflag])
                layer.member(name, kind, b"x" * size if kind == b"0" else b"", link=link)
            builder = FileTableBuilder(SMALL)
            stream = open_layer(io.BytesIO(layer.bytes()), SMALL)
            for number, member in enumerate(members(stream, SMALL)):
                builder.add(member.header, number)
            tables.append(builder.finish())
        tree = merge(tables)
    except Rejected:
        return
    seen = [0] * len(tree.links)
    for path, node in tree.walk():
        assert b".wh." not in path
        if node.inode >= 0:
            seen[tree.bases[node.layer] + node.inode] += 1
    assert seen == list(tree.links)
    for table in tables:
        encoded = table.encode()
        assert FileTable.decode(encoded, SMALL).encode() == encoded
    assert write_erofs(tree) == write_erofs(tree)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=3000), st.booleans())
def test_random_bytes(blob: bytes, after_header: bool) -> None:
    """C37: random bytes, and random bytes behind an extension header, end."""
    consume(header(b"x", b"x", size=len(blob)) + blob if after_header else blob)
