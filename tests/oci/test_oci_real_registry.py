"""Images pushed by other tools (skopeo, oras) to a real docker-registry, with and without auth."""

from __future__ import annotations

import gzip
import json
import subprocess
from contextlib import asynccontextmanager

import oras.client
import pytest
from kits.oci_images import layer_tar, make_image, make_index, sha256, write_layout
from kits.registry_process import PASSWORD, USER

from imagecache.errors import Denied, NotFound, Rejected
from imagecache.oci.manifest import NoPlatform
from imagecache.oci.platform import Platform
from imagecache.oci.reference import parse_reference
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.source import open_source

AMD64 = Platform("linux", "amd64")


def run(*argv, cwd=None):
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def push(layout, registry, name, *, auth=False, many=False):
    run(
        "skopeo",
        "copy",
        "-q",
        *(["--all"] if many else []),
        "--dest-tls-verify=false",
        *(["--dest-creds", f"{USER}:{PASSWORD}"] if auth else []),
        f"oci:{layout}",
        f"docker://{registry.host}/{name}",
    )


@asynccontextmanager
async def opened(text, **settings):
    source = open_source(parse_reference(text), RegistrySettings(**settings))
    try:
        yield source
    finally:
        await source.close()


async def pull(text, directory, platform=AMD64, **settings):
    async with opened(text, **settings) as source:
        found = await source.resolve(platform)
        for layer in found.layers:
            target = directory / layer.descriptor.digest.hex
            await source.fetch_blob(layer.descriptor, target, lambda n: None)
            assert sha256(gzip.decompress(target.read_bytes())) == str(layer.diff_id)
    return found


async def test_pushed_by_skopeo(registry, tmp_path):
    """By tag and by digest; another tag is NotFound."""
    image = make_image([{"big": b"abc" * 1_000_000}, {"small": b"1"}])
    push(write_layout(tmp_path / "l", {None: image}), registry, "by/skopeo:v1")
    found = await pull(f"{registry.host}/by/skopeo:v1", tmp_path)
    assert str(found.digest) == image.digest
    pinned = await pull(f"{registry.host}/by/skopeo:wrong@{found.digest}", tmp_path)
    assert pinned.manifest_raw == found.manifest_raw
    for name in ("by/skopeo:v2", "by/nobody:v1"):
        with pytest.raises(NotFound):
            await pull(f"{registry.host}/{name}", tmp_path)


async def test_docker_schema2(registry, tmp_path):
    """The same image as docker's manifest v2 schema 2."""
    layout = write_layout(tmp_path / "l", {None: make_image()})
    run(
        *("skopeo", "copy", "-q", "--format", "v2s2", "--dest-tls-verify=false"),
        f"oci:{layout}",
        f"docker://{registry.host}/by/docker:v1",
    )
    found = await pull(f"{registry.host}/by/docker:v1", tmp_path)
    assert found.manifest.media_type.startswith("application/vnd.docker.")


async def test_docker_archive_by_skopeo(registry, tmp_path):
    """A docker archive written by another tool has the diff ids of the image it came from."""
    image = make_image()
    layout = write_layout(tmp_path / "l", {None: image})
    run("skopeo", "copy", "-q", f"oci:{layout}", f"docker-archive:{tmp_path / 'a.tar'}:app:v1")
    for text in (
        f"docker-archive:{tmp_path / 'a.tar'}",
        f"docker-archive:{tmp_path / 'a.tar'}:app:v1",
    ):
        async with opened(text) as source:
            found = await source.resolve(AMD64)
            for layer in found.layers:
                target = tmp_path / layer.descriptor.digest.hex
                await source.fetch_blob(layer.descriptor, target, lambda n: None)
    expected = [
        sha256(layer_tar(files))
        for files in ({"etc/hello": b"hello\n"}, {"usr/bin/x": b"x" * 3000})
    ]
    assert [str(layer.diff_id) for layer in found.layers] == expected


async def test_multi_platform(registry, tmp_path):
    """An index in a real registry: each platform its image, none for the others."""
    images = {name: make_image([{name: b"1"}], architecture=name) for name in ("amd64", "arm64")}
    index = make_index(
        [
            (image, {"platform": {"os": "linux", "architecture": name}})
            for name, image in images.items()
        ]
    )
    push(write_layout(tmp_path / "l", {None: index}), registry, "multi:v1", many=True)
    for name, image in images.items():
        found = await pull(f"{registry.host}/multi:v1", tmp_path, Platform("linux", name))
        assert str(found.digest) == image.digest
    with pytest.raises(NoPlatform):
        await pull(f"{registry.host}/multi:v1", tmp_path, Platform("linux", "s390x"))


async def test_made_by_umoci(registry, tmp_path):
    """A layout made by umoci, straight and through a registry, and its run settings."""
    layout = tmp_path / "made"
    run("umoci", "init", "--layout", str(layout))
    run("umoci", "new", "--image", f"{layout}:v1")
    (tmp_path / "file").write_text("hello")
    run(
        "umoci", "insert", "--rootless", "--image", f"{layout}:v1", str(tmp_path / "file"), "/etc/f"
    )
    run(
        "umoci",
        "config",
        "--image",
        f"{layout}:v1",
        "--config.cmd",
        "/bin/x",
        "--config.env",
        "A=1",
    )
    async with opened(f"oci:{layout}:v1") as source:
        direct = await source.resolve(AMD64)
    assert direct.config.cmd == ("/bin/x",) and "A=1" in direct.config.env
    push(f"{layout}:v1", registry, "umoci:v1")
    found = await pull(f"{registry.host}/umoci:v1", tmp_path)
    assert found.digest == direct.digest


async def test_pushed_by_oras(registry, tmp_path):
    """B15: an image pushed by oras-py is pulled, an artifact refused by name."""
    tar = layer_tar({"a": b"1"})
    packed = gzip.compress(tar, mtime=0)
    (tmp_path / "layer.tgz").write_bytes(packed)
    config = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [sha256(tar)]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    client = oras.client.OrasClient(hostname=registry.host, insecure=True)
    client.push(
        target=f"{registry.host}/by/oras:v1",
        files=[f"{tmp_path / 'layer.tgz'}:application/vnd.oci.image.layer.v1.tar+gzip"],
        manifest_config=f"{tmp_path / 'config.json'}:application/vnd.oci.image.config.v1+json",
        disable_path_validation=True,
    ).close()
    found = await pull(f"{registry.host}/by/oras:v1", tmp_path)
    assert found.layers[0].descriptor.size == len(packed)
    client.push(
        target=f"{registry.host}/by/oras:artifact",
        files=[f"{tmp_path / 'layer.tgz'}:application/x.example"],
        disable_path_validation=True,
    ).close()
    with pytest.raises(Rejected, match="not a container image"):
        await pull(f"{registry.host}/by/oras:artifact", tmp_path)


async def test_basic_auth(guarded_registry, tmp_path, docker_config):
    """Basic auth with the right password, a wrong one, and none."""
    host = guarded_registry.host
    image = make_image()
    push(write_layout(tmp_path / "l", {None: image}), guarded_registry, "private:v1", auth=True)
    found = await pull(f"{host}/private:v1", tmp_path, docker_config=docker_config(host))
    assert str(found.digest) == image.digest
    with pytest.raises(Denied, match="refuses our credentials") as caught:
        wrong = docker_config(host, password="wr0ng")
        await pull(f"{host}/private:v1", tmp_path, docker_config=wrong)
    assert "wr0ng" not in str(caught.value)
    with pytest.raises(Denied, match="auth required"):
        await pull(f"{host}/private:v1", tmp_path)


async def test_resume_from_a_real_registry(registry, tmp_path):
    """A14: docker-registry answers ranges: the rest alone is fetched."""
    import random

    image = make_image([{"big": random.Random(1).randbytes(3_000_000)}])
    push(write_layout(tmp_path / "l", {None: image}), registry, "resume:v1")
    async with opened(f"{registry.host}/resume:v1") as source:
        layer = (await source.resolve(AMD64)).layers[0].descriptor
        body = image.blobs[str(layer.digest)]
        target = tmp_path / "blob"
        (tmp_path / "blob.partial").write_bytes(body[:2_000_000])
        counts = []
        await source.fetch_blob(layer, target, counts.append)
    assert target.read_bytes() == body and min(counts) == 2_000_000
