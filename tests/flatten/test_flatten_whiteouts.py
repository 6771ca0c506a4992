"""Whiteouts, replacement and duplicates: rows C12, C17-C23, and more of section 3."""

from __future__ import annotations

import pytest
from kits.layersdisk import flat_listing, flatten, table_of
from kits.tarlayer import TarLayer

from imagecache.errors import Rejected
from imagecache.flatten.tree import merge

pytestmark = pytest.mark.quick

BASE = (
    TarLayer().directory(b"d", mode=0o750, uid=5).file(b"d/a", b"1").file(b"d/b", b"2")
    .file(b"d/sub/c", b"3").file(b"f", b"4").bytes()
)  # fmt: skip


def test_whiteout_via_symlink() -> None:
    """C12: whiteouts never follow symlinks: the target's files stay, the link too."""
    lower = TarLayer().symlink(b"lib", b"usr/lib").file(b"usr/lib/x", b"1").bytes()
    for upper in (TarLayer().whiteout(b"lib/x"), TarLayer().opaque(b"lib")):
        found = flat_listing(lower, upper.bytes())
        assert found == {b"lib": b"-> usr/lib", b"usr": "/", b"usr/lib": "/", b"usr/lib/x": b"1"}
    same = TarLayer().symlink(b"lib", b"usr/lib").whiteout(b"lib/x").opaque(b"lib").bytes()
    assert flat_listing(lower, same)[b"usr/lib/x"] == b"1"


@pytest.mark.parametrize("name", [b".wh.", b"a/.wh.", b".wh..", b".wh...", b"d/.wh.x/y"])
def test_bad_whiteouts(name: bytes) -> None:
    """C17: a whiteout of no name, of a dot, and a file below a whiteout are refused."""
    with pytest.raises(Rejected, match="whiteout"):
        table_of(TarLayer().file(name).bytes())


def test_whiteout_name_through_a_symlink() -> None:
    """C17: a symlink may point to a whiteout's name, but no directory is made there."""
    layer = TarLayer().symlink(b"a", b".wh.x")
    assert flat_listing(layer.bytes()) == {b"a": b"-> .wh.x"}
    with pytest.raises(Rejected, match="leads to the whiteout"):
        table_of(layer.file(b"a/b").bytes())


def test_aufs_leftovers() -> None:
    """C17: aufs's own files are ignored, whatever they are."""
    layer = (
        TarLayer().directory(b".wh..wh.plnk").file(b".wh..wh.plnk/12.34", b"x")
        .file(b".wh..wh.aufs").directory(b"d/.wh..wh.orph").file(b"ok")
        .file(b".wh..wh..opq/x")
    )  # fmt: skip
    assert flat_listing(layer.bytes()) == {b"ok": b""}


def test_whiteouts_by_name() -> None:
    """C17: the name makes the whiteout: as a directory, symlink or with content it is one too."""
    for layer in (
        TarLayer().directory(b".wh.f"),
        TarLayer().symlink(b".wh.f", b"x"),
        TarLayer().file(b".wh.f", b"content" * 1000),
        TarLayer().hardlink(b".wh.f", b"anything"),
        TarLayer().device(b".wh.f", b"3", 0, 0),
    ):
        assert b"f" not in flat_listing(BASE, layer.bytes())
        assert not any(b".wh." in path for path in flat_listing(BASE, layer.bytes()))


def test_opaque_order() -> None:
    """C18: opaque hides the layers below only, before or after its siblings."""
    for upper in (
        TarLayer().opaque(b"d").file(b"d/new", b"5"),
        TarLayer().file(b"d/new", b"5").opaque(b"d"),
        TarLayer().directory(b"d", mode=0o700).file(b"d/new", b"5").whiteout(b"d/a").opaque(b"d"),
    ):
        found = flat_listing(BASE, upper.bytes())
        assert found == {b"d": "/", b"d/new": b"5", b"f": b"4"}
    top = TarLayer().opaque(b"").file(b"new").bytes()
    assert flat_listing(BASE, top) == {b"new": b""}


def test_opaque_in_the_lowest_layer() -> None:
    """C18: opaque marks and whiteouts in the lowest layer do nothing and are not shown."""
    layer = TarLayer().opaque(b"d").whiteout(b"x").file(b"d/a", b"1").bytes()
    assert flat_listing(layer) == {b"d": "/", b"d/a": b"1"}
    assert flat_listing(TarLayer().opaque(b"d").bytes()) == {}


def test_opaque_keeps_lower_attributes() -> None:
    """C18: an opaque directory without an entry of its own keeps the attributes below."""
    tree, _ = flatten(BASE, TarLayer().opaque(b"d").bytes())
    node = tree.lookup(b"d")
    assert node is not None
    assert (node.layer, tree.tables[0].mode[node.inode], tree.tables[0].uid[node.inode]) == (
        0, 0o40750, 5,
    )  # fmt: skip


def test_whiteout_of_nothing() -> None:
    """C19: hiding what is not there is a no-op, and makes no directories."""
    upper = TarLayer().whiteout(b"none").whiteout(b"no/where").whiteout(b"f/x").opaque(b"f")
    assert flat_listing(BASE, upper.bytes()) == flat_listing(BASE)


def test_whiteout_and_entry_in_one_layer() -> None:
    """C18: a whiteout never hides its own layer; what it hid below does not shine through."""
    for upper in (
        TarLayer().whiteout(b"d").file(b"d/new", b"5"),
        TarLayer().file(b"d/new", b"5").whiteout(b"d"),
        TarLayer().whiteout(b"d").directory(b"d", mode=0o755).file(b"d/new", b"5"),
    ):
        assert flat_listing(BASE, upper.bytes()) == {b"d": "/", b"d/new": b"5", b"f": b"4"}
    both = TarLayer().whiteout(b"f").file(b"f", b"again").bytes()
    assert flat_listing(BASE, both)[b"f"] == b"again"


def test_whiteout_then_implicit_directory_has_default_attributes() -> None:
    """C23: a hidden directory's attributes are gone; a made parent is 0755 root at the epoch."""
    tree, _ = flatten(BASE, TarLayer().whiteout(b"d").file(b"d/new").bytes())
    node = tree.lookup(b"d")
    assert node is not None and (node.layer, node.inode) == (-1, -1)


def test_four_types_over_four_layers() -> None:
    """C20: file, directory, symlink, file: the last wins and nothing is left over."""
    layers = [
        TarLayer().file(b"p", b"1"),
        TarLayer().directory(b"p").file(b"p/x"),
        TarLayer().symlink(b"p", b"q"),
        TarLayer().file(b"p", b"4"),
    ]
    built = [layer.bytes() for layer in layers]
    expected = [b"1", "/", b"-> q", b"4"]
    for count in range(1, 5):
        assert flat_listing(*built[:count])[b"p"] == expected[count - 1]
    assert flat_listing(*built) == {b"p": b"4"}


def test_child_of_a_file() -> None:
    """C21: an entry below a file makes a directory of it, in the layer and over it."""
    assert flat_listing(TarLayer().file(b"f", b"x").file(b"f/y", b"1").bytes()) == {
        b"f": "/", b"f/y": b"1",
    }  # fmt: skip
    assert flat_listing(BASE, TarLayer().file(b"f/y/z", b"1").bytes())[b"f/y/z"] == b"1"


def test_duplicates() -> None:
    """C22: the last of a name wins: a directory's attributes, a file's content; links made before
    keep the first file."""
    layer = (
        TarLayer().directory(b"d", mode=0o700).file(b"d/x", b"1").directory(b"d", mode=0o711, uid=3)
        .hardlink(b"link", b"d/x").file(b"d/x", b"2").hardlink(b"late", b"d/x")
    )  # fmt: skip
    tree, contents = flatten(layer.bytes())
    assert flat_listing(layer.bytes()) == {
        b"d": "/", b"d/x": b"2", b"late": b"2", b"link": b"1",
    }  # fmt: skip
    table = tree.tables[0]
    assert (table.mode[0], table.uid[0]) == (0o40711, 3)
    replaced = TarLayer().file(b"d/x", b"1").file(b"d", b"file").bytes()
    assert flat_listing(replaced) == {b"d": b"file"}
    assert len(contents[0]) == 2


def test_duplicate_content_is_dropped() -> None:
    """C22: what a later duplicate replaced is in no data region."""
    table = table_of(TarLayer().file(b"x", b"1" * 9000).file(b"x", b"2").bytes())
    assert (table.inode_count, list(table.contents), list(table.size)) == (1, [1], [1])


def test_missing_parents() -> None:
    """C23: missing parents are 0755 root:root at the epoch, unless a layer below knows better;
    a later entry for them counts."""
    tree, _ = flatten(TarLayer().file(b"a/b/c").bytes())
    node = tree.lookup(b"a/b")
    assert node is not None and node.layer == -1
    late = TarLayer().file(b"a/b").directory(b"a", mode=0o700).bytes()
    assert table_of(late).mode[0] == 0o40700
    over, _ = flatten(BASE, TarLayer().file(b"d/sub/new").bytes())
    node = over.lookup(b"d")
    assert node is not None and node.layer == 0


def test_empty_image() -> None:
    """Section 3: an image of no layers, and of empty ones, is a root directory."""
    assert [path for path, _ in merge([]).walk()] == [b""]
    empty = table_of(b"")
    assert [path for path, _ in merge([empty, empty]).walk()] == [b""]


def test_the_same_layer_twice() -> None:
    """B9, section 3: a layer applied twice shows once."""
    assert flat_listing(BASE, BASE) == flat_listing(BASE)


def test_many_layers() -> None:
    """Section 3: 130 layers that each add and hide something."""
    layers = [
        TarLayer().file(b"f%d" % n, b"%d" % n).whiteout(b"f%d" % (n - 1)).file(b"all", b"%d" % n)
        for n in range(130)
    ]
    assert flat_listing(*(layer.bytes() for layer in layers)) == {b"all": b"129", b"f129": b"129"}


def test_dead_and_live() -> None:
    """Section 3: the tree knows which inodes no path leads to."""
    tree, _ = flatten(BASE, TarLayer().whiteout(b"d").file(b"f", b"new").bytes())
    table = tree.tables[0]
    assert not any(tree.is_live(0, inode) for inode in range(table.inode_count))
    assert tree.is_live(1, 0)
