"""Layout directories and docker archives, as given by somebody we do not trust."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from contextlib import asynccontextmanager

import pytest
from kits.oci_images import (
    OCI_LAYER,
    layer_tar,
    make_image,
    make_index,
    sha256,
    write_archive,
    write_layout,
)

from imagecache.errors import CubecacheError, Denied, LimitExceeded, NotFound, Rejected, Unsupported
from imagecache.oci.platform import Platform
from imagecache.oci.reference import parse_reference
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.source import open_source

AMD64 = Platform("linux", "amd64")


@asynccontextmanager
async def opened(text):
    source = open_source(parse_reference(text), RegistrySettings())
    try:
        yield source
    finally:
        await source.close()


async def resolve(text, platform=AMD64):
    async with opened(text) as source:
        return await source.resolve(platform)


async def pull(text, directory):
    """Resolve and fetch everything; returns the image and its layer files' bytes."""
    async with opened(text) as source:
        found = await source.resolve(AMD64)
        bodies = []
        for layer in found.layers:
            counts = []
            target = directory / layer.descriptor.digest.hex
            await source.fetch_blob(layer.descriptor, target, counts.append)
            assert counts[-1] == layer.descriptor.size
            bodies.append(target.read_bytes())
    return found, bodies


async def test_layout(tmp_path):
    """A layout of one image, without a name and with one."""
    image = make_image()
    root = write_layout(tmp_path / "l", {"v1": image})
    for text in (f"oci:{root}", f"oci:{root}:v1"):
        found, bodies = await pull(text, tmp_path)
        assert str(found.digest) == image.digest
        assert [sha256(body) for body in bodies] == [str(x.descriptor.digest) for x in found.layers]
        assert found.name == text


async def test_layout_of_several(tmp_path):
    """Several named images ask for a name; several platforms do not."""
    one, two = make_image([{"n": b"1"}]), make_image([{"n": b"2"}])
    root = write_layout(tmp_path / "l", {"v1": one, "v2": two})
    with pytest.raises(NotFound, match="v1, v2"):
        await resolve(f"oci:{root}")
    with pytest.raises(NotFound, match="no image v3"):
        await resolve(f"oci:{root}:v3")
    assert str((await resolve(f"oci:{root}:v2")).digest) == two.digest
    arm = make_image(architecture="arm64")
    index = make_index(
        [
            (one, {"platform": {"os": "linux", "architecture": "amd64"}}),
            (arm, {"platform": {"os": "linux", "architecture": "arm64"}}),
        ]
    )
    root = write_layout(tmp_path / "m", {None: index})
    assert str((await resolve(f"oci:{root}", Platform("linux", "arm64"))).digest) == arm.digest


async def test_layout_that_is_none(tmp_path):
    """Not there, not a layout, another version, broken files: each has its own error."""
    with pytest.raises(NotFound, match="no directory"):
        await resolve(f"oci:{tmp_path / 'absent'}")
    with pytest.raises(NotFound, match="not an OCI image layout"):
        await resolve(f"oci:{tmp_path}")
    root = write_layout(tmp_path / "l", {None: make_image()})
    (root / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    with pytest.raises(Unsupported):
        await resolve(f"oci:{root}")
    (root / "oci-layout").write_text("{}")
    with pytest.raises(Unsupported):
        await resolve(f"oci:{root}")
    root = write_layout(tmp_path / "k", {None: make_image()})
    for text in (
        "[]",
        "{}",
        '{"manifests": 5}',
        '{"manifests": []}',
        '{"manifests": [], "layers": []}',
    ):
        (root / "index.json").write_text(text)
        with pytest.raises(CubecacheError):
            await resolve(f"oci:{root}")


async def test_layout_blob_traps(tmp_path):
    """A blob that is a link, a pipe, a directory, missing, rotten, cut or grown."""
    image = make_image()
    root = write_layout(tmp_path / "l", {None: image})
    layer = json.loads(image.top)["layers"][0]["digest"]
    path = root / "blobs" / "sha256" / layer[7:]
    body = path.read_bytes()
    secret = tmp_path / "secret"
    secret.write_bytes(body)

    async def refused(kind):
        with pytest.raises(kind):
            await pull(f"oci:{root}", tmp_path)
        assert not (tmp_path / layer[7:]).exists()
        assert not (tmp_path / (layer[7:] + ".partial")).exists()

    path.unlink()
    await refused(NotFound)
    path.symlink_to(secret)
    await refused(Rejected)
    path.unlink()
    os.mkfifo(path)
    await refused(Rejected)
    path.unlink()
    path.mkdir()
    await refused(Rejected)
    path.rmdir()
    for broken in (bytes(len(body)), body[:-1], b""):
        path.write_bytes(broken)
        await refused(Rejected)
    path.write_bytes(body)
    assert (await pull(f"oci:{root}", tmp_path))[1][0] == body


async def test_layout_digest_that_climbs(tmp_path):
    """B5: no file name is made of a digest that is not one."""
    root = write_layout(tmp_path / "l", {None: make_image()})
    index = json.loads((root / "index.json").read_text())
    index["manifests"][0]["digest"] = "sha256:../../../etc/passwd"
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(Rejected, match="digest"):
        await resolve(f"oci:{root}")


async def test_layout_swapped_manifest(tmp_path):
    """A20: a manifest file with other content than its name."""
    image = make_image()
    root = write_layout(tmp_path / "l", {None: image})
    (root / "blobs" / "sha256" / image.digest[7:]).write_bytes(make_image([{"e": b"1"}]).top)
    with pytest.raises(Rejected):
        await resolve(f"oci:{root}")


async def test_archive(tmp_path):
    """A docker archive: plain layers, digests equal to diff ids, the same manifest every time."""
    layers = [{"a": b"1" * 2_000_000}, {"b": b"2"}]
    path = write_archive(tmp_path / "a.tar", {"app:1": layers})
    found, bodies = await pull(f"docker-archive:{path}", tmp_path)
    assert bodies == [layer_tar(files) for files in layers]
    assert [x.descriptor.digest for x in found.layers] == [x.diff_id for x in found.layers]
    again = write_archive(tmp_path / "b.tar", {"other:2": [{"x": b""}], "app:1": layers})
    named = await resolve(f"docker-archive:{again}:app:1")
    assert named.digest == found.digest and named.manifest_raw == found.manifest_raw
    with pytest.raises(NotFound, match="app:1"):
        await resolve(f"docker-archive:{again}")
    with pytest.raises(NotFound, match="no image"):
        await resolve(f"docker-archive:{again}:app:9")


async def test_archive_manifest_is_stable(tmp_path):
    """The made manifest is a format: these bytes, and no others."""
    layers = [{"a": b"1"}, {"b": b"2"}]
    path = write_archive(tmp_path / "a.tar", {"app:1": layers})
    found = await resolve(f"docker-archive:{path}")
    listed = ",".join(
        f'{{"digest":"{sha256(layer_tar(files))}","mediaType":"{OCI_LAYER}",'
        f'"size":{len(layer_tar(files))}}}'
        for files in layers
    )
    assert found.manifest_raw.decode() == (
        f'{{"config":{{"digest":"{sha256(found.config_raw)}",'
        '"mediaType":"application/vnd.docker.container.image.v1+json",'
        f'"size":{len(found.config_raw)}}},"layers":[{listed}],'
        '"mediaType":"application/vnd.oci.image.manifest.v1+json","schemaVersion":2}'
    )
    assert str(found.digest) == sha256(found.manifest_raw)


def rewrite(path, out, change):
    """Copy an archive, each (member, body) through `change`, which returns pairs."""
    with tarfile.open(path) as old, tarfile.open(out, "w") as new:
        for member in old:
            body = old.extractfile(member).read() if member.isreg() else b""
            for changed, content in change(member, body):
                changed.size = len(content) if changed.isreg() else 0
                new.addfile(changed, io.BytesIO(content))
    return out


async def test_archive_with_links_and_compression(tmp_path):
    """Old archives link a repeated layer, other tools compress them: both are read."""
    path = write_archive(tmp_path / "a.tar", {"app:1": [{"a": b"1"}, {"b": b"2"}]})
    with tarfile.open(path) as tar:
        table = json.loads(tar.extractfile("manifest.json").read())
    first = table[0]["Layers"][0]

    def change(member, body):
        if member.name != first:
            return [(member, body)]
        real = tarfile.TarInfo("store/real.tar")
        link = tarfile.TarInfo(first)
        link.type, link.linkname = tarfile.SYMTYPE, "../store/real.tar"
        return [(link, b""), (real, gzip.compress(body, mtime=0))]

    changed = rewrite(path, tmp_path / "b.tar", change)
    found, bodies = await pull(f"docker-archive:{changed}", tmp_path)
    assert found.layers[0].descriptor.media_type == OCI_LAYER + "+gzip"
    assert sha256(gzip.decompress(bodies[0])) == str(found.layers[0].diff_id)


async def test_archive_wrong_layer(tmp_path):
    """B12: a layer whose bytes are not its diff id's is refused when it is fetched."""
    path = write_archive(tmp_path / "a.tar", {"app:1": [{"a": b"1"}]})
    evil = layer_tar({"a": b"2"})
    changed = rewrite(
        path,
        tmp_path / "b.tar",
        lambda m, body: [(m, evil if m.name.endswith("layer.tar") else body)],
    )
    with pytest.raises(Rejected, match="digest"):
        await pull(f"docker-archive:{changed}", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "b.tar"]


@pytest.mark.parametrize("compress", ["gz", "xz", "bz2"])
async def test_compressed_archive(tmp_path, compress):
    """A compressed archive is named as that, with the remedy."""
    with tarfile.open(tmp_path / "a.tar", f"w:{compress}") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(Unsupported, match="decompress"):
        await resolve(f"docker-archive:{tmp_path / 'a.tar'}")


async def test_archive_that_is_none(tmp_path):
    """Absent, empty, random, a plain tar, a directory, a pipe, cut off at many places."""
    path = tmp_path / "x"
    with pytest.raises(NotFound):
        await resolve(f"docker-archive:{path}")
    for body in (
        b"",
        b"x" * 2000,
        bytes(10_240),
        b"\xff" * 2048,
        layer_tar({"a": b"1"}),
        b"PK\3\4" * 500,
    ):
        path.write_bytes(body)
        with pytest.raises(Rejected):
            await resolve(f"docker-archive:{path}")
    whole = write_archive(tmp_path / "a.tar", {"app:1": [{"a": b"1"}]}).read_bytes()
    last_byte = len(whole.rstrip(b"\0"))
    for length in range(1, last_byte, 487):
        path.write_bytes(whole[:length])
        with pytest.raises(CubecacheError):
            await resolve(f"docker-archive:{path}")
    path.unlink()
    path.mkdir()
    with pytest.raises((Rejected, Denied)):
        await resolve(f"docker-archive:{path}")
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(Rejected):
        await resolve(f"docker-archive:{path}")


def header(name="manifest.json", size=b"00000000002\0", kind=b"0", link=b""):
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "body",
    [
        header(size=b"\xff" * 12) + b"[]" + bytes(2000),  # base-256: -1 (CVE-2025-8194's class)
        header(size=b"\xff" + bytes(10) + b"\0") + bytes(2000),
        header(size=b"\x80" + b"\x7f" * 11) + bytes(2000),
        header(size=b"77777777777\0") + bytes(2000),
        header(size=b"zzzzzzzzzzz\0") + bytes(2000),
        header(kind=b"x", size=b"00000000014\0")
        + b"99 path=x\n\n\n".ljust(512, b"\0")
        + header()
        + bytes(2000),
        header(kind=b"x", size=b"00000000014\0")
        + b"0 a=b\n".ljust(512, b"\0")
        + header()
        + bytes(2000),
        header(kind=b"x", size=b"00000000013\0")
        + b"11 size=-1\n".ljust(512, b"\0")
        + header()
        + bytes(2000),
        header(kind=b"L", size=b"77777777777\0") + bytes(2000),
    ],
)
async def test_archive_hostile_headers(tmp_path, body):
    """Negative and endless sizes and lying extended headers end in a typed error."""
    path = tmp_path / "x.tar"
    path.write_bytes(body)
    with pytest.raises(Rejected):
        await resolve(f"docker-archive:{path}")


async def test_archive_names_never_become_paths(tmp_path):
    """A Config of `../../etc/passwd`, an absolute one, links that climb or go round: NotFound."""
    path = write_archive(tmp_path / "a.tar", {"app:1": [{"a": b"1"}]})
    for name in ("../../etc/passwd", "/etc/passwd", "loop", "climb", "", "a" * 5000):

        def change(member, body, name=name):
            if member.name != "manifest.json":
                return [(member, body)]
            links = []
            for link, goal in (("loop", "loop"), ("climb", "../../../etc/passwd")):
                made = tarfile.TarInfo(link)
                made.type, made.linkname = tarfile.SYMTYPE, goal
                links.append((made, b""))
            table = json.loads(body)
            table[0]["Config"] = name
            return [*links, (member, json.dumps(table).encode())]

        changed = rewrite(path, tmp_path / "b.tar", change)
        with pytest.raises(NotFound):
            await resolve(f"docker-archive:{changed}")


async def test_archive_broken_tables(tmp_path):
    """manifest.json of other forms than docker's."""
    path = write_archive(tmp_path / "a.tar", {"app:1": [{"a": b"1"}]})
    tables = [
        b"{}",
        b"[]",
        b"[1]",
        b'[{"Config": 5}]',
        b'[{"Config": "x", "Layers": [1]}]',
        b"[[[",
        b"[" * 100_000,
    ]
    for table in tables:
        changed = rewrite(
            path, tmp_path / "b.tar", lambda m, b: [(m, table if m.name == "manifest.json" else b)]
        )
        with pytest.raises((Rejected, NotFound)):
            await resolve(f"docker-archive:{changed}")


async def test_archive_many_members(tmp_path):
    """More members than anybody saves are too many."""
    path = tmp_path / "x.tar"
    path.write_bytes(header("x", size=b"00000000000\0") * 100_001 + bytes(1024))
    with pytest.raises(LimitExceeded):
        await resolve(f"docker-archive:{path}")
