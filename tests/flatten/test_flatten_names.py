"""Names, symlinks and hard links inside and across layers: rows C9-C16, C24, C25, C35."""

from __future__ import annotations

import pytest
from kits.layersdisk import flat_listing, flatten, table_of
from kits.tarlayer import TarLayer

from imagecache.errors import LimitExceeded, Rejected
from imagecache.flatten.limits import Limits

pytestmark = pytest.mark.quick


def links_of(*layers: bytes) -> dict[bytes, int]:
    """Names per inode of the merged tree, by path, for files that have more than one."""
    tree, _ = flatten(*layers)
    result = {}
    for path, node in tree.walk():
        if node.directory is None:
            count = tree.links[tree.bases[node.layer] + node.inode]
            if count > 1:
                result[path] = count
    return result


def test_normal_forms() -> None:
    """C9: absolute names, dots, doubled slashes and inner dot-dots are normalised."""
    for name in (b"/etc/x", b"./etc/x", b"./././etc/x", b"etc//x", b"a/../etc/x", b"etc/./x",
                 b"//etc///x", b"a/b/../../etc/x"):  # fmt: skip
        assert flat_listing(TarLayer().file(name, b"1").bytes()) == {b"etc": "/", b"etc/x": b"1"}
    for name in (b"", b".", b"/", b"./", b"a/.."):
        tree, _ = flatten(TarLayer().directory(name, mode=0o711).bytes())
        node = tree.lookup(b"")
        assert node is not None and tree.tables[0].mode[node.inode] == 0o40711


@pytest.mark.parametrize("name", [b"../../etc/x", b"a/../../b", b"..", b"/../x", b"./../x"])
def test_above_the_root(name: bytes) -> None:
    """C9: a name that climbs out of the root is refused, also as a link's target."""
    for layer in (
        TarLayer().file(name),
        TarLayer().directory(name),
        TarLayer().file(b"f").hardlink(b"l", name),
        TarLayer().whiteout(name + b"/x"),
    ):
        with pytest.raises(Rejected, match="climbs out"):
            table_of(layer.bytes())


def test_root_stays_a_directory() -> None:
    """C10: a symlink, file or hard link in the root's place is refused (CVE-2021-29136)."""
    for name in (b"/.", b".", b"", b"/", b"a/.."):
        for layer in (
            TarLayer().symlink(name, b"/tmp"),
            TarLayer().file(name, b"x"),
            TarLayer().file(b"f").hardlink(name, b"f"),
            TarLayer().fifo(name),
        ):
            if name.endswith(b"/") and layer.parts[0][156:157] == b"0":
                continue  # a regular file's name with a slash behind means a directory
            with pytest.raises(Rejected, match="root"):
                table_of(layer.bytes())


def test_symlinked_parents_in_one_layer() -> None:
    """C11: parents resolve through the same layer's symlinks, relative, absolute and climbing."""
    layer = (
        TarLayer()
        .symlink(b"lib", b"usr/lib")
        .file(b"lib/x", b"1")
        .symlink(b"abs", b"/usr/lib")
        .file(b"abs/y", b"2")
        .symlink(b"deep/up", b"../../../usr/./lib/../lib")
        .file(b"deep/up/z", b"3")
        .symlink(b"chain", b"abs")
        .directory(b"chain/d")
    )
    assert flat_listing(layer.bytes()) == {
        b"abs": b"-> /usr/lib", b"chain": b"-> abs", b"deep": "/",
        b"deep/up": b"-> ../../../usr/./lib/../lib", b"lib": b"-> usr/lib", b"usr": "/",
        b"usr/lib": "/", b"usr/lib/d": "/", b"usr/lib/x": b"1", b"usr/lib/y": b"2",
        b"usr/lib/z": b"3",
    }  # fmt: skip


def test_symlinked_parents_over_layers() -> None:
    """C11: in the next layer, an entry below a link replaces it by a directory (overlayfs)."""
    lower = TarLayer().symlink(b"lib", b"usr/lib").file(b"lib/x", b"1").symlink(b"etc", b"/tmp")
    upper = TarLayer().file(b"lib/y", b"2").file(b"etc/passwd", b"root")
    assert flat_listing(lower.bytes(), upper.bytes()) == {
        b"etc": "/", b"etc/passwd": b"root", b"lib": "/", b"lib/y": b"2", b"usr": "/",
        b"usr/lib": "/", b"usr/lib/x": b"1",
    }  # fmt: skip


def test_host_paths_are_never_meant() -> None:
    """C11: etc -> /tmp, then etc/passwd: the virtual root's /tmp."""
    layer = TarLayer().symlink(b"etc", b"/tmp").file(b"etc/passwd", b"x").bytes()
    assert flat_listing(layer) == {b"etc": b"-> /tmp", b"tmp": "/", b"tmp/passwd": b"x"}


def test_replaced_symlink_is_not_followed_any_more() -> None:
    """C11: a link that is replaced, or a directory that becomes a link, redirects later names."""
    layer = (
        TarLayer()
        .symlink(b"l", b"one").file(b"l/a")
        .symlink(b"l", b"two").file(b"l/b")
        .directory(b"l").file(b"l/c")
    )  # fmt: skip
    assert set(flat_listing(layer.bytes())) == {
        b"l", b"l/c", b"one", b"one/a", b"two", b"two/b",
    }  # fmt: skip


def test_symlink_loops() -> None:
    """C13: loops are stored; a name that would go through one is refused."""
    loop = TarLayer().symlink(b"a", b"b").symlink(b"b", b"a").symlink(b"self", b"self")
    assert flat_listing(loop.bytes()) == {b"a": b"-> b", b"b": b"-> a", b"self": b"-> self"}
    with pytest.raises(Rejected, match="more than 40 symlinks"):
        table_of(loop.file(b"a/x").bytes())
    with pytest.raises(Rejected, match="more than 40 symlinks"):
        table_of(TarLayer().symlink(b"a", b"a").hardlink(b"h", b"a/x").bytes())


def test_symlink_targets() -> None:
    """C13: targets up to 4,095 bytes are stored as they are; longer, empty and NUL are refused."""
    target = (b"x/\xff\n" * 2000)[:4095]
    assert flat_listing(TarLayer().symlink(b"l", target).bytes()) == {b"l": b"-> " + target}
    for bad in (b"x" * 4096, b""):
        with pytest.raises(Rejected, match="symlink target"):
            table_of(TarLayer().symlink(b"l", bad).bytes())
    with pytest.raises(Rejected, match="NUL"):
        table_of(TarLayer().symlink(b"l", b"x", records={b"linkpath": b"a\0b"}).bytes())


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (TarLayer().hardlink(b"l", b"later").file(b"later"), "stands before it"),
        (TarLayer().hardlink(b"l", b"l"), "to itself"),
        (TarLayer().file(b"l").hardlink(b"l", b"l"), "to itself"),
        (TarLayer().file(b"l").hardlink(b"./l", b"/l"), "to itself"),
        (TarLayer().directory(b"d").hardlink(b"l", b"d"), "to a directory"),
        (TarLayer().file(b"d/f").hardlink(b"l", b"d"), "to a directory"),
        (TarLayer().hardlink(b"l", b"/"), "root directory"),
        (TarLayer().hardlink(b"l", b"../x"), "climbs out"),
        (TarLayer().file(b"f").hardlink(b"l", b"f/x"), "no directory"),
    ],
)
def test_bad_hard_links(layer: TarLayer, why: str) -> None:
    """C14: hard links forward, to themselves, to directories and outside are refused."""
    with pytest.raises(Rejected, match=why):
        flatten(layer.bytes())


def test_hard_links_to_nothing() -> None:
    """C14: a target that no lower layer has, or that is a directory there, is refused."""
    lower = TarLayer().directory(b"d").file(b"f").bytes()
    for target in (b"missing", b"d", b"d/x", b"f/x"):
        with pytest.raises(Rejected, match="no file of the layers below"):
            flatten(lower, TarLayer().hardlink(b"l", target).bytes())


def test_hard_link_via_symlink_and_of_symlink() -> None:
    """C14: a target's parents follow symlinks; a target that is a symlink is linked itself."""
    layer = TarLayer().symlink(b"lib", b"usr/lib").file(b"usr/lib/x", b"1").hardlink(b"l", b"lib/x")
    layer.symlink(b"s", b"nowhere").hardlink(b"t", b"s")
    assert flat_listing(layer.bytes())[b"l"] == b"1"
    assert flat_listing(layer.bytes())[b"t"] == b"-> nowhere"
    assert links_of(layer.bytes()) == {b"l": 2, b"usr/lib/x": 2, b"s": 2, b"t": 2}
    lower = TarLayer().symlink(b"lib", b"/usr/lib").file(b"usr/lib/x", b"1").bytes()
    assert flat_listing(lower, TarLayer().hardlink(b"l", b"lib/x").bytes())[b"l"] == b"1"


def test_hard_links_to_lower_layers() -> None:
    """C14: a link to a lower layer's file is a further name of it, over any number of layers."""
    lower = TarLayer().file(b"a", b"content", uid=7).bytes()
    middle = TarLayer().hardlink(b"b", b"a").hardlink(b"c", b"b").bytes()
    upper = TarLayer().hardlink(b"d", b"c").whiteout(b"a").bytes()
    assert flat_listing(lower, middle, upper) == dict.fromkeys((b"b", b"c", b"d"), b"content")
    assert links_of(lower, middle, upper) == {b"b": 3, b"c": 3, b"d": 3}


def test_hard_link_to_what_the_same_layer_deletes() -> None:
    """C14: links see the layers below as they were: renaming by link and whiteout works."""
    lower = TarLayer().file(b"old", b"content").bytes()
    for upper in (
        TarLayer().hardlink(b"new", b"old").whiteout(b"old"),
        TarLayer().whiteout(b"old").hardlink(b"new", b"old"),
    ):
        assert flat_listing(lower, upper.bytes()) == {b"new": b"content"}


def test_hard_link_outlives_its_target() -> None:
    """C14: deleting or replacing one name leaves the other its content (ggcr #977)."""
    lower = TarLayer().file(b"d/a", b"content").hardlink(b"b", b"d/a").bytes()
    for upper in (TarLayer().whiteout(b"d/a"), TarLayer().whiteout(b"d"), TarLayer().opaque(b"d"),
                  TarLayer().file(b"d/a", b"new"), TarLayer().symlink(b"d", b"x")):  # fmt: skip
        assert flat_listing(lower, upper.bytes())[b"b"] == b"content"
        assert links_of(lower, upper.bytes()) == {}


def test_hard_link_chain() -> None:
    """C14: a chain of 1,000 links is one file of 1,001 names."""
    layer = TarLayer().file(b"l0", b"x")
    for number in range(1000):
        layer.hardlink(b"l%d" % (number + 1), b"l%d" % number)
    assert set(links_of(layer.bytes()).values()) == {1001}


def test_hard_link_parent_without_entry() -> None:
    """C14: a link whose parent has no entry gets one (apple/container #1797)."""
    layer = TarLayer().file(b"a", b"x").hardlink(b"no/entry/b", b"a").bytes()
    assert flat_listing(layer)[b"no/entry/b"] == b"x"


def test_alias_overwritten_later() -> None:
    """C15: overwriting one alias, in the layer or above, keeps the others' content (#2002)."""
    first = TarLayer().file(b"a", b"old").hardlink(b"b", b"a").hardlink(b"c", b"a")
    layer = first.file(b"b", b"new").bytes()
    assert flat_listing(layer) == {b"a": b"old", b"b": b"new", b"c": b"old"}
    assert links_of(layer) == {b"a": 2, b"c": 2}
    above = TarLayer().file(b"a", b"newer").bytes()
    assert flat_listing(layer, above) == {b"a": b"newer", b"b": b"new", b"c": b"old"}


def test_deep_and_long() -> None:
    """C24: depth 5,000, a 4,097-byte path and a 256-byte name are refused; the longest that Linux
    can open are kept."""
    deepest = b"/".join([b"d"] * 2048)
    assert deepest in flat_listing(TarLayer().directory(deepest).bytes())
    longest = b"/".join([b"n" * 254] * 16) + b"/" + b"f" * 15
    assert len(longest) == 4095
    assert longest in flat_listing(TarLayer().file(longest).bytes())
    assert b"n" * 255 in flat_listing(TarLayer().file(b"n" * 255).bytes())
    for bad in (b"/".join([b"d"] * 5000), longest + b"gg", b"n" * 256, b"a/" + b"n" * 256 + b"/b"):
        with pytest.raises(LimitExceeded):
            table_of(TarLayer().file(bad).bytes())
    through = TarLayer().symlink(b"s", longest[: 255 * 15]).file(b"s/" + b"x" * 254 + b"/yyyyyy")
    with pytest.raises(LimitExceeded):
        table_of(through.file(b"s/" + b"x" * 254 + b"/" + b"y" * 250).bytes())


def test_entry_caps() -> None:
    """C24: entries, implicit directories and the paths' total length have caps."""
    many = TarLayer()
    for number in range(101):
        many.file(b"%d" % number)
    with pytest.raises(LimitExceeded, match="more than 100"):
        table_of(many.bytes(), Limits(entries=100))
    deep = TarLayer()
    for number in range(20):
        deep.file(b"%d/" % number + b"/".join([b"d"] * 100) + b"/f")
    with pytest.raises(LimitExceeded, match="names"):
        table_of(deep.bytes(), Limits(entries=1000))
    with pytest.raises(LimitExceeded, match="paths"):
        table_of(deep.bytes(), Limits(path_total_bytes=100_000))
    marks = TarLayer()
    for number in range(11):
        marks.whiteout(b"%d" % number)
    with pytest.raises(LimitExceeded):
        table_of(marks.bytes(), Limits(entries=10))


ODD_NAMES = [b"\xff\xfe", b"a\nb", b"\x1b[31mred", "\u202egnp".encode(), b"\xed\xa0\x80", b" ",
             b"-", b"!", b"~", b"\x01", b"\\", b"*", "\u00e9".encode(), "e\u0301".encode(),
             b"A", b"a", b"...", b"..a", b"wh.", b"x.wh.y"]  # fmt: skip


def test_odd_names() -> None:
    """C25, C35: any bytes but NUL and slash are kept; case and Unicode forms stay apart."""
    layer = TarLayer()
    for name in ODD_NAMES:
        layer.file(name, name)
        layer.file(b"d/" + name + b"/x", name)
    found = flat_listing(layer.bytes())
    for name in ODD_NAMES:
        assert found[name] == name and found[b"d/" + name + b"/x"] == name


def test_messages_are_escaped() -> None:
    """C25: messages show a bad name escaped, with its place in the layer."""
    layer = TarLayer().file(b"ok").file(b"\x1b[2J\xff\n/../../x").bytes()
    with pytest.raises(Rejected) as caught:
        table_of(layer)
    text = str(caught.value)
    assert text.isprintable() and text.isascii()
    assert "\\x1b[2J\\xff\\x0a" in text and "byte 512" in text


def test_bytewise_path_order() -> None:
    """The file table lists names in bytewise order of whole paths, whatever the tar's order."""
    names = [b"a/b", b"a-b", b"a", b"a.b/c", b"a/b-c/d", b"Z", b"\xff/x", b"a/b/c"]
    layer = TarLayer()
    for name in reversed(names):
        layer.directory(name)
    paths = list(table_of(layer.bytes()).paths())
    assert paths == sorted(paths)
    table = table_of(layer.bytes())
    assert [table.path(entry) for entry in range(table.entry_count)] == paths
    assert all(table.find_entry(path) == entry for entry, path in enumerate(paths))
    assert table.find_entry(b"nowhere") is None
