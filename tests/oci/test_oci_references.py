"""References, digests, platforms: the pure grammars."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagecache.errors import Rejected, Unsupported, UsageError
from imagecache.oci.digest import Digest
from imagecache.oci.platform import Platform, fitness, host_platform, parse_platform
from imagecache.oci.reference import (
    ArchiveReference,
    LayoutReference,
    RegistryReference,
    parse_reference,
)

pytestmark = pytest.mark.quick
SHA = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("index.docker.io/a/b", "docker.io/a/b:latest"),
        ("a/b", "docker.io/a/b:latest"),
        ("a/b/c:X.y-z_9", "docker.io/a/b/c:X.y-z_9"),
        ("localhost/a", "localhost/a:latest"),
        ("localhost:5000/a", "localhost:5000/a:latest"),
        ("Reg.Example/a", "reg.example/a:latest"),
        ("127.0.0.1:5000/a:t", "127.0.0.1:5000/a:t"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        (f"reg.example/a@{SHA}", f"reg.example/a@{SHA}"),
        (f"x:tag@{SHA}", f"docker.io/library/x@{SHA}"),
        ("a__b/c-d.e--f", "docker.io/a__b/c-d.e--f:latest"),
        ("registry:5000", "docker.io/library/registry:5000"),
    ],
)
def test_a25_good_references(text, canonical):
    """A25: short names, ports, digests; a digest decides over a tag."""
    parsed = parse_reference(text)
    assert isinstance(parsed, RegistryReference)
    assert parsed.canonical == canonical
    assert parse_reference(canonical).canonical == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "UPPER/x",
        "a/UPPER",
        "a..b",
        "a___b",
        "-a",
        "a-",
        ".a",
        "a//b",
        "/a",
        "a/",
        "../x",
        "a/../b",
        "reg.example/../b",
        "x:",
        "reg.example/x:",
        "x:-t",
        "x:" + "t" * 129,
        "x@",
        "x@sha256:abc",
        f"x@{SHA}@{SHA}",
        f"x@{SHA.upper()}",
        "x@md5:" + "a" * 32,
        "x:tag:tag",
        "a" * 300,
        "reg.example/" + "a" * 250,
        "é/x",
        "ｒeg.example/x",  # noqa: RUF001 - a full-width letter is the point
        "x\n",
        "x\x00y",
        "x y",
        "reg.example:0/x",
        "reg.example:99999/x",
        "reg.example:/x",
        "user@reg.example/x",
        "https://reg.example/x",
        "[::1/x",
        "[1.2.3.4]:5/x",
        "-reg.example/x",
        "reg..example/x",
        "ab" * 32,
        "oci:",
        "oci:dir:",
        "oci:dir:ta g",
        "docker-archive:",
        "docker-archive:f:",
        "docker-archive:f:UPPER/x",
    ],
)
def test_a25_bad_references(text):
    """A25: what the grammar does not allow is a usage error."""
    with pytest.raises(UsageError):
        parse_reference(text)


def test_local_references():
    """Layouts and archives, with and without names, relative and absolute."""
    assert parse_reference("oci:/a/b") == LayoutReference(Path("/a/b"), None)
    assert parse_reference("oci:/a/b:v1") == LayoutReference(Path("/a/b"), "v1")
    assert parse_reference("oci:/a:b/c") == LayoutReference(Path("/a:b/c"), None)
    assert parse_reference("oci:/a:b/c:v1") == LayoutReference(Path("/a:b/c"), "v1")
    assert parse_reference("oci:x", base=Path("/w")).path == Path("/w/x")
    archive = parse_reference("docker-archive:/f.tar:busybox:1", base=Path("/w"))
    assert archive == ArchiveReference(Path("/f.tar"), "docker.io/library/busybox:1")
    for text in ("oci:/a/b:v1", "oci:/a", "docker-archive:/f.tar", archive.canonical):
        assert parse_reference(text).canonical == text
        assert parse_reference(parse_reference(text).canonical) == parse_reference(text)


@given(st.text(max_size=80))
def test_a25_anything(text):
    """A25: any text parses or is a usage error."""
    try:
        parsed = parse_reference(text)
    except UsageError:
        return
    assert parse_reference(parsed.canonical).canonical == parsed.canonical


@pytest.mark.parametrize(
    "text",
    [
        "sha256:../../x",
        "sha256:" + "AB" * 32,
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 65,
        "sha256:" + "a" * 64 + "\n",
        "md5:" + "a" * 32,
        "sha512:" + "a" * 64,
        "sha256:" + "a" * 63 + "g",
        "sha256",
        "",
        5,
        None,
        ["sha256"],
        "sha256:" + "a" * 100_000,
    ],
)
def test_b5_bad_digests(text):
    """B5: only lower-case sha256 and sha512 of the exact length."""
    with pytest.raises(Rejected):
        Digest.parse(text)


def test_b5_good_digests():
    """B5: sha256 and sha512 round trip and verify."""
    for algorithm in ("sha256", "sha512"):
        digest = Digest.of(b"x", algorithm)
        assert Digest.parse(str(digest)) == digest
        hasher = digest.hasher()
        assert not digest.matches(hasher)
        hasher.update(b"x")
        assert digest.matches(hasher)


def test_platforms():
    """Parsing, aliases, and this host's own."""
    assert parse_platform("linux/arm64/v8") == Platform("linux", "arm64", "v8")
    assert parse_platform("linux/x86_64") == Platform("linux", "amd64")
    assert str(Platform("linux", "arm", "v7")) == "linux/arm/v7"
    for bad in ("", "linux", "linux/", "a/b/c/d", "Linux/amd64", "linux/am d64"):
        with pytest.raises(UsageError):
            parse_platform(bad)
    assert host_platform("aarch64") == Platform("linux", "arm64")
    assert host_platform("armv7l") == Platform("linux", "arm", "v7")
    assert host_platform().os == "linux"
    with pytest.raises(Unsupported):
        host_platform("pdp11")


@pytest.mark.parametrize(
    ("wanted", "offered", "order"),
    [
        ("linux/arm64", ["linux/arm64/v8", "linux/arm64"], [0, 1]),
        ("linux/arm64", ["linux/arm64/v9", "linux/arm/v7"], []),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], [2, 1, 0]),
        ("linux/arm/v6", ["linux/arm", "linux/arm/v5"], [1]),
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64", "windows/amd64"], [1]),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2"], [1, 0]),
        ("linux/ppc64le", ["linux/ppc64le/power9", "linux/ppc64le"], [1, 0]),
        ("linux/riscv64", ["linux/amd64"], []),
    ],
)
def test_variants(wanted, offered, order):
    """Lower variants of one architecture run; the best comes first, ties in given order."""
    ranks = [
        (fitness(parse_platform(wanted), parse_platform(text)), n) for n, text in enumerate(offered)
    ]
    fitting = sorted(((-rank, n) for rank, n in ranks if rank is not None))
    assert [n for _, n in fitting] == order
