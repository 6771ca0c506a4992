"""Manifests, indexes and configurations: parsed strictly, or refused with a reason."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kits.oci_images import (
    DOCKER_CONFIG,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Image,
    descriptor,
    make_image,
    make_index,
    sha256,
)
from kits.registry_server import Reply, serve_manifest

from imagecache.errors import CubecacheError, LimitExceeded, NotFound, Rejected, Unsupported
from imagecache.oci.manifest import (
    ImageIndex,
    ImageManifest,
    NoPlatform,
    parse_config,
    parse_manifest,
)
from imagecache.oci.platform import Platform
from imagecache.oci.settings import RegistryLimits
from imagecache.oci.strictjson import parse_json

AMD64 = Platform("linux", "amd64")
LIMITS = RegistryLimits()
quick = pytest.mark.quick


def parse(members, told=None):
    raw = members if isinstance(members, bytes) else json.dumps(members).encode()
    return parse_manifest(raw, told, limits=LIMITS, what="m")


def manifest(**edits):
    return json.loads(make_image(manifest_edits=edits).top)


@pytest.fixture
def resolve(server, source):
    async def run(image, platform=AMD64, **changes):
        server.add_image(image)
        async with source(**changes) as s:
            return await s.resolve(platform)

    return run


async def test_resolved_image(resolve):
    """What a resolved image says: digests, raw bytes, layers with diff ids, run settings."""
    run = {
        "Env": ["A=1"],
        "Entrypoint": ["/e"],
        "Cmd": None,
        "User": "1:2",
        "WorkingDir": "/w",
        "StopSignal": "SIGINT",
        "Labels": {"k": "v"},
    }
    image = make_image(run=run)
    found = await resolve(image)
    assert str(found.digest) == image.digest and found.manifest_raw == image.top
    config = found.config
    assert (config.env, config.entrypoint, config.cmd) == (("A=1",), ("/e",), ())
    assert (config.user, config.working_dir, config.stop_signal) == ("1:2", "/w", "SIGINT")
    assert pickle.loads(pickle.dumps(found)) == found  # it travels to conversion workers
    assert config.labels == {"k": "v"} and config.os == "linux" and config.architecture == "amd64"
    assert [str(layer.diff_id) for layer in found.layers] == json.loads(found.config_raw)["rootfs"][
        "diff_ids"
    ]


async def test_b1_huge_manifest(server, source):
    """B1: a 200 MB manifest is cut off at 4 MiB, told or not."""

    async def endless(request):
        await request.raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        for _ in range(3200):
            await request.raw(b" " * 65536)
            await asyncio.sleep(0)

    for handler in (endless, lambda r: Reply(200, b"{", length=200 << 20)):
        server.routes["/v2/app/manifests/v1"] = handler
        async with source() as s:
            with pytest.raises(LimitExceeded):
                await s.resolve(AMD64)


@quick
@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 65 + b"]" * 65,
        b'{"a": 1, "a": 2}',
        b'{"x": [{"a": 1, "\\u0061": 2}]}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1' + b"0" * 400 + b"}",
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": 1}'.encode("utf-16"),
        '{"a": 1}'.encode("utf-32"),
        b'{"a": 1} x',
        b'{"a": 1}{"a": 1}',
        b'{"a": 1}\x00',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b"{'a': 1}",
        b'{"a": 01}',
        b'{"a": "\n"}',
        b"",
        b"{",
        b"\x00",
    ],
)
def test_b2_hostile_json(raw):
    """B2: depth, duplicates, NaN, huge numbers, marks, trailing bytes: all refused, typed."""
    with pytest.raises(Rejected):
        parse_json(raw, limit=1 << 22, what="x")


@quick
def test_b2_good_json():
    """B2: what is refused is only what is odd."""
    assert parse_json(
        b' {"a": [1, -2.5e3, null, true, "\\u00e9\xc3\xa9"]} \n', limit=99, what="x"
    ) == {"a": [1, -2500.0, None, True, "éé"]}
    assert parse_json(b"[" * 64 + b"]" * 64, limit=999, what="x")
    with pytest.raises(LimitExceeded):
        parse_json(b"[1]", limit=2, what="x")


@quick
def test_b3_two_faces():
    """B3: a body with manifests and layers is refused, whatever it is given as (CVE-2021-41190)."""
    both = manifest() | {"manifests": []}
    for told in (None, OCI_MANIFEST, OCI_INDEX):
        for edit in ({}, {"mediaType": OCI_INDEX}, {"mediaType": None}):
            with pytest.raises(Rejected):
                parse(both | edit, told)
    with pytest.raises(Rejected):
        parse({"schemaVersion": 2, "manifests": [], "config": {}})
    with pytest.raises(Rejected):
        parse(manifest() | {"fsLayers": []})


@quick
def test_b4_media_types_disagree():
    """B4: a body that calls itself another type than it was given as."""
    with pytest.raises(Rejected):
        parse(manifest(), OCI_INDEX)
    with pytest.raises(Rejected):
        parse(manifest(), DOCKER_MANIFEST)
    with pytest.raises(Rejected):
        parse(manifest(), "text/html")
    with pytest.raises(Rejected):
        parse({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "manifests": []})
    for told in (None, OCI_MANIFEST, OCI_MANIFEST + "; charset=utf-8", "application/json"):
        assert isinstance(parse(manifest(), told), ImageManifest)
    assert isinstance(parse({"schemaVersion": 2, "manifests": []}), ImageIndex)


async def test_b4_content_type_on_the_wire(server, source):
    """B4: the Content-Type header counts, for the top and for a child of an index."""
    image = make_image()
    server.add_image(image)
    server.routes["/v2/app/manifests/v1"] = serve_manifest(image.top, DOCKER_MANIFEST)
    async with source() as s:
        with pytest.raises(Rejected):
            await s.resolve(AMD64)
    index = make_index([(image, {"platform": {"os": "linux", "architecture": "amd64"}})])
    server.add_image(index)
    server.routes[f"/v2/app/manifests/{image.digest}"] = serve_manifest(image.top, OCI_INDEX)
    async with source() as s:
        with pytest.raises(Rejected):
            await s.resolve(AMD64)


@quick
@pytest.mark.parametrize("size", [-1, 2**63, None, "5", 5.0, 5.5, True, [5], 10**30])
def test_b6_sizes(size):
    """B6: a size is a whole number in 0..2^63-1."""
    good = descriptor(b"{}", OCI_CONFIG)
    with pytest.raises(Rejected):
        parse(manifest(config=good | {"size": size}))
    with pytest.raises(Rejected):
        parse(manifest(layers=[descriptor(b"x", OCI_LAYER) | {"size": size}]))


@quick
@pytest.mark.parametrize(
    "digest", ["sha256:../../x", "sha256:" + "A" * 64, "md5:" + "a" * 32, 5, None]
)
def test_b5_digests_in_descriptors(digest):
    """B5: a descriptor's digest is checked before anything is made of it."""
    with pytest.raises(Rejected):
        parse(manifest(layers=[descriptor(b"x", OCI_LAYER) | {"digest": digest}]))


def on(os, architecture, variant=None):
    members = {"os": os, "architecture": architecture}
    return {"platform": members | ({"variant": variant} if variant else {})}


async def test_b7_no_platform(resolve):
    """B7: no entry for the platform: the error says which there are."""
    arm = make_image(architecture="arm64")
    index = make_index([(arm, on("linux", "arm64", "v8"))])
    with pytest.raises(NoPlatform, match="linux/arm64/v8") as caught:
        await resolve(index)
    assert isinstance(caught.value, NotFound)
    assert str((await resolve(index, Platform("linux", "arm64"))).digest) == arm.digest


async def test_b7_single_image_of_another_platform(resolve):
    """B7: a single image is judged by its configuration."""
    with pytest.raises(NoPlatform, match="linux/s390x"):
        await resolve(make_image(architecture="s390x"))


async def test_b7_best_variant(resolve):
    """B7: the best variant that runs, wherever it stands."""
    images = {
        v: make_image([{"v": v.encode()}], architecture="arm", variant=v)
        for v in ("v5", "v6", "v7")
    }
    index = make_index([(image, on("linux", "arm", v)) for v, image in images.items()])
    assert str((await resolve(index, Platform("linux", "arm", "v6"))).digest) == images["v6"].digest
    assert str((await resolve(index, Platform("linux", "arm"))).digest) == images["v7"].digest


async def test_b7_nesting(resolve):
    """B7: an index in an index is followed; fifty are not."""
    image = make_image()
    top = make_index([(image, on("linux", "amd64"))])
    top = make_index([(top, {})])
    assert str((await resolve(top)).digest) == image.digest
    for _ in range(48):
        top = make_index([(top, {})])
    with pytest.raises(LimitExceeded, match="nested"):
        await resolve(top)


async def test_b7_self_reference(server, source, resolve):
    """B7: an index that names itself by a digest that cannot be its own."""
    fake = sha256(b"any")
    raw = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [{"mediaType": OCI_INDEX, "digest": fake, "size": 300}],
        }
    ).encode()
    for path in ("v1", fake):
        server.routes[f"/v2/app/manifests/{path}"] = serve_manifest(raw, OCI_INDEX)
    async with source() as s:
        with pytest.raises(Rejected):
            await s.resolve(AMD64)
    assert len(server.seen) <= 3


async def test_b7_many_guesses(resolve):
    """B7: an index of a thousand entries that name no platform is not walked to its end."""
    images = [make_image([{"n": b"%d" % n}], architecture="s390x") for n in range(100)]
    with pytest.raises(LimitExceeded, match="manifests"):
        await resolve(make_index([(image, {}) for image in images]))


async def test_b8_attestations_are_skipped(resolve, server):
    """B8: attestations and unknown platforms and types are passed over."""
    image = make_image()
    attestation = make_image([], os="unknown", architecture="unknown")
    index = make_index(
        [
            (attestation, on("unknown", "unknown")),
            (
                attestation,
                on("linux", "amd64")
                | {"annotations": {"vnd.docker.reference.type": "attestation-manifest"}},
            ),
            (attestation, on("linux", "amd64") | {"mediaType": "application/x.unknown"}),
            (image, on("linux", "amd64")),
        ]
    )
    assert str((await resolve(index)).digest) == image.digest
    with pytest.raises(NoPlatform):
        await resolve(make_index([(attestation, on("unknown", "unknown"))]))


async def test_b9_layer_counts(resolve):
    """B9: no layer is an image, the same layer twice is two layers, 10,000 are too many."""
    assert (await resolve(make_image([]))).layers == ()
    twice = await resolve(make_image([{"a": b"1"}, {"a": b"1"}]))
    assert len(twice.layers) == 2 and twice.layers[0] == twice.layers[1]
    layer = descriptor(b"x", OCI_LAYER)
    with pytest.raises(LimitExceeded):
        parse(manifest(layers=[layer] * 10_000))
    with pytest.raises(Rejected):
        parse(manifest(layers={}))
    with pytest.raises(Rejected):
        parse(manifest(layers=[5]))


@quick
def test_b11_schema1():
    """B11: schema 1, by its version or its type, is named as what it is."""
    v1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
    old = {"schemaVersion": 1, "name": "x", "fsLayers": [], "history": []}
    for members, told in ((old, v1), (old, None), (old, OCI_MANIFEST), ({"fsLayers": []}, v1)):
        with pytest.raises(Unsupported, match="unsupported schema1"):
            parse(members, told)
    with pytest.raises(Rejected):
        parse(manifest(schemaVersion=3))
    with pytest.raises(Rejected):
        parse(manifest(schemaVersion="2"))


async def test_b12_diff_ids(resolve):
    """B12: as many diff ids as layers; a wrong one is found when the layer is decompressed."""
    diff_ids = [sha256(b"1"), sha256(b"2"), sha256(b"3")]
    for ids in (diff_ids, [], None):
        broken = make_image(config_edits={"rootfs": {"type": "layers", "diff_ids": ids}})
        with pytest.raises(Rejected, match="diff ids"):
            await resolve(broken)


@quick
@pytest.mark.parametrize(
    "edit",
    [
        {"rootfs": None},
        {"rootfs": {"type": "other", "diff_ids": []}},
        {"rootfs": {"type": "layers", "diff_ids": ["sha256:x"]}},
        {"rootfs": {"type": "layers", "diff_ids": "sha256"}},
        {"config": []},
        {"config": {"Env": "A=1"}},
        {"config": {"Env": [1]}},
        {"config": {"Env": [None]}},
        {"config": {"Cmd": ["a\x00b"]}},
        {"config": {"User": 5}},
        {"config": {"Labels": {"a": 1}}},
        {"os": 5},
        {"architecture": "a\x00"},
    ],
)
def test_b12_config_types(edit):
    """B12: a configuration whose members are of other types."""
    raw = json.dumps({"rootfs": {"type": "layers", "diff_ids": []}} | edit).encode()
    with pytest.raises(Rejected):
        parse_config(raw, limit=1 << 20, max_layers=512, what="c")


@quick
def test_config_nulls():
    """Null and absent are the same everywhere a member may be absent."""
    raw = json.dumps(
        {
            "os": None,
            "config": dict.fromkeys(("Env", "Cmd", "Entrypoint", "User", "Labels")),
            "rootfs": {"type": "layers", "diff_ids": None},
        }
    ).encode()
    config = parse_config(raw, limit=1 << 20, max_layers=512, what="c")
    assert (config.os, config.env, config.cmd, config.user, config.labels) == ("", (), (), "", {})


@quick
def test_b13_inline_data():
    """B13: embedded content that is not what its digest and size say."""
    good = base64.b64encode(b"{}").decode()
    config = descriptor(b"{}", OCI_CONFIG)
    assert parse(manifest(config=config | {"data": good})).config.inline == b"{}"
    for bad in (
        base64.b64encode(b"[]").decode(),
        base64.b64encode(b"{} ").decode(),
        "%%",
        5,
        good + "\n",
    ):
        with pytest.raises(Rejected):
            parse(manifest(config=config | {"data": bad}))


async def test_b14_label_and_bytes_disagree(resolve, server, source, tmp_path):
    """B14: a blob is fetched as it is; its own magic decides when it is read."""
    image = make_image([{"a": b"1"}], compress=False)
    members = json.loads(image.top)
    members["layers"][0]["mediaType"] = OCI_LAYER + "+gzip"
    raw = json.dumps(members).encode()
    mislabelled = Image(sha256(raw), {sha256(raw): (raw, OCI_MANIFEST)}, image.blobs)
    server.add_image(mislabelled)
    async with source() as s:
        found = await s.resolve(AMD64)
        layer = found.layers[0]
        await s.fetch_blob(layer.descriptor, tmp_path / "b", lambda n: None)
    assert sha256((tmp_path / "b").read_bytes()) == str(layer.diff_id)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"config": descriptor(b"{}", "application/vnd.cncf.helm.config.v1+json")}, "helm"),
        ({"config": descriptor(b"{}", "application/vnd.wasm.config.v0+json")}, "wasm"),
        (
            {
                "config": descriptor(b"{}", "application/vnd.oci.empty.v1+json"),
                "artifactType": "application/vnd.example.sbom",
            },
            "sbom",
        ),
    ],
)
async def test_b15_artifacts(resolve, edits, says):
    """B15: artifacts are named as not a container image."""
    with pytest.raises(Rejected, match=f"not a container image.*{says}"):
        await resolve(make_image(manifest_edits=edits))


@pytest.mark.parametrize(
    ("media_type", "says"),
    [
        (OCI_LAYER + "+gzip+encrypted", "encrypted"),
        ("application/vnd.wasm.content.layer.v1+wasm", "not a container image"),
        ("application/vnd.cncf.helm.chart.content.v1.tar+gzip", "not a container image"),
    ],
)
async def test_b15_layers(resolve, media_type, says):
    """B15: encrypted and unknown layers are named."""
    image = make_image()
    layers = json.loads(image.top)["layers"]
    layers[1]["mediaType"] = media_type
    with pytest.raises(Rejected, match=says):
        await resolve(make_image(manifest_edits={"layers": layers}))


@quick
def test_b15_other_top_types():
    """B15: a manifest of another type altogether."""
    with pytest.raises(Rejected, match="not a container image"):
        parse({"mediaType": "application/vnd.oci.artifact.manifest.v1+json", "blobs": []})
    with pytest.raises(Rejected):
        parse({"mediaType": "not a type"})
    with pytest.raises(Rejected):
        parse([1])


@quick
def test_docker_types():
    """Docker's own media types are read as OCI's are."""
    parsed = parse(manifest(mediaType=DOCKER_MANIFEST, config=descriptor(b"{}", DOCKER_CONFIG)))
    assert parsed.config.media_type == DOCKER_CONFIG


async def test_a19_wrong_digest_header(server, source):
    """A19: a wrong Docker-Content-Digest over the right body: the computed digest holds."""
    image = make_image()
    server.add_image(image)
    wrong = {"Docker-Content-Digest": sha256(b"other")}
    body, media_type = image.manifests[image.digest]
    server.routes["/v2/app/manifests/v1"] = lambda r: Reply(
        200, body, wrong | {"Content-Type": media_type}
    )
    async with source() as s:
        assert str((await s.resolve(AMD64)).digest) == image.digest
    server.routes[f"/v2/app/manifests/{image.digest}"] = server.routes["/v2/app/manifests/v1"]
    async with source(f"app@{image.digest}") as s:
        assert str((await s.resolve(AMD64)).digest) == image.digest


async def test_a20_right_header_wrong_body(server, source):
    """A20: the right header over a wrong body is refused, by tag and by digest."""
    image = make_image()
    server.add_image(image)
    other = make_image([{"evil": b"1"}])
    headers = {"Docker-Content-Digest": image.digest, "Content-Type": OCI_MANIFEST}
    for name in ("v1", image.digest):
        server.routes[f"/v2/app/manifests/{name}"] = lambda r: Reply(200, other.top, headers)
    for name in ("app:v1", f"app@{image.digest}", f"app:v1@{image.digest}"):
        async with source(name) as s:
            with pytest.raises(Rejected):
                await s.resolve(AMD64)


async def test_a20_wrong_config(server, source):
    """A20: a configuration that is not the one the manifest names."""
    image = make_image()
    server.add_image(image)
    digest = json.loads(image.top)["config"]["digest"]
    server.routes[f"/v2/app/blobs/{digest}"] = lambda r: Reply(200, image.blobs[digest] + b" ")
    async with source() as s:
        with pytest.raises(Rejected):
            await s.resolve(AMD64)


async def test_a23_tag_moves(server, source, tmp_path):
    """A23: a tag that moves while we pull: everything belongs to the first answer."""
    first, second = make_image([{"v": b"1"}]), make_image([{"v": b"2"}])
    index = make_index([(first, on("linux", "amd64"))])
    server.add_image(second)
    later = server.routes["/v2/app/manifests/v1"]
    server.add_image(index)
    sooner = server.routes["/v2/app/manifests/v1"]

    def moving(request):
        server.routes["/v2/app/manifests/v1"] = later
        return sooner(request)

    server.routes["/v2/app/manifests/v1"] = moving
    async with source() as s:
        found = await s.resolve(AMD64)
        await s.fetch_blob(found.layers[0].descriptor, tmp_path / "b", lambda n: None)
    assert str(found.digest) == first.digest


async def test_a24_tag_deleted(server, source):
    """A24: a tag, a child manifest or a config that is gone is NotFound."""
    image = make_image()
    index = make_index([(image, on("linux", "amd64"))])
    config = json.loads(image.top)["config"]["digest"]
    for gone in ("manifests/v1", f"manifests/{image.digest}", f"blobs/{config}"):
        server.add_image(index)
        server.routes[f"/v2/app/{gone}"] = lambda r: Reply(404)
        async with source() as s:
            with pytest.raises(NotFound):
                await s.resolve(AMD64)


KEYS = st.sampled_from(
    "schemaVersion mediaType config layers manifests digest size platform os architecture urls "
    "data annotations rootfs type diff_ids Env".split()
)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
ATOMS |= st.sampled_from([OCI_INDEX, OCI_MANIFEST, OCI_CONFIG, "sha256:" + "a" * 64, 2])
TREES = st.recursive(
    ATOMS, lambda t: st.lists(t, max_size=4) | st.dictionaries(KEYS, t, max_size=6)
)


@quick
@given(TREES)
def test_b2_any_tree(tree):
    """B2: any JSON parses or is refused with a type of ours, as a manifest and as a config."""
    raw = json.dumps(tree).encode()
    for call in (
        lambda: parse(raw),
        lambda: parse(raw, OCI_MANIFEST),
        lambda: parse_config(raw, limit=1 << 20, max_layers=512, what="c"),
    ):
        try:
            call()
        except CubecacheError:
            pass


@quick
@given(st.binary(max_size=200))
def test_b2_any_bytes(raw):
    """B2: any bytes parse or are refused with a type of ours."""
    try:
        parse_json(raw, limit=1 << 20, what="x")
    except Rejected:
        pass
