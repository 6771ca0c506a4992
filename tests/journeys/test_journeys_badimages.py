"""Broken and hostile images at the command line (catalogue B and C): refused, nothing half-made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from imagemaker.entries import Entry, directory, write_tar
from imagemaker.layout import Settings
from kits.image import (
    add_blob,
    edit_config,
    edit_manifest,
    layer_blobs,
    reference,
    set_manifest,
    write_image,
    write_tars,
)
from kits.journey import Cubecache

REFUSED = (65, 66, 78)


def small(folder: Path) -> Path:
    write_image(
        folder,
        [[directory("etc"), Entry("etc/hostname", content=b"a\n")], [Entry("b", content=b"b\n")]],
        Settings(command=("/b",)),
    )
    return folder


def both_kinds(manifest: dict[str, Any]) -> None:
    manifest["manifests"] = []


def size(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["layers"][0].update(size=value)


def digest(value: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["layers"][0].update(digest=value)


MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "B3 both manifests and layers": both_kinds,
    "B5 digest with a path": digest("sha256:../../../../etc/passwd"),
    "B5 upper-case digest": digest("sha256:" + "A" * 64),
    "B5 short digest": digest("sha256:" + "a" * 63),
    "B5 md5": digest("md5:d41d8cd98f00b204e9800998ecf8427e"),
    "B6 negative size": size(-1),
    "B6 size 2^63": size(2**63),
    "B6 size as text": size("12"),
    "B6 size as a float": size(12.0),
    "B6 no size": lambda manifest: manifest["layers"][0].pop("size"),
    "B9 10,000 layers": lambda manifest: manifest.update(layers=manifest["layers"] * 5000),
    "B11 schema 1": lambda manifest: {
        "schemaVersion": 1,
        "name": "x",
        "tag": "y",
        "architecture": "amd64",
        "fsLayers": [],
        "history": [],
    },
    "B12 a layer too few": lambda manifest: manifest["layers"].pop(),
    "B13 data that disagrees": lambda manifest: manifest["config"].update(data="e30="),
    "B15 not a container image": lambda manifest: manifest["config"].update(
        mediaType="application/vnd.cncf.helm.config.v1+json"
    ),
    "B15 encrypted layer": lambda manifest: manifest["layers"][0].update(
        mediaType="application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
    ),
    "A24 a blob that is not there": digest("sha256:" + "0" * 64),
}

RAW_MANIFESTS: dict[str, bytes] = {
    "B1 a manifest of 5 MiB": b'{"schemaVersion":2,"x":"' + b"x" * (5 << 20) + b'"}',
    "B2 depth 100,000": b"[" * 100_000 + b"]" * 100_000,
    "B2 duplicate keys": b'{"schemaVersion":2,"schemaVersion":2}',
    "B2 NaN": b'{"schemaVersion":NaN}',
    "B2 10^400": b'{"schemaVersion":1' + b"0" * 400 + b"}",
    "B2 trailing data": b'{"schemaVersion":2} x',
    "B2 an array": b"[]",
    "B2 nothing": b"",
}

LAYERS: dict[str, bytes] = {
    "C6 cut in a header": write_tar([Entry("a", content=b"a" * 2000)])[:300],
    "C6 cut in its data": write_tar([Entry("a", content=b"a" * 2000)])[:1000],
    "C7 bad checksum": b"\x00" * 100 + b"garbage" * 100,
    "C9 climbs out": write_tar([Entry("../../etc/passwd", content=b"x")]),
    "C14 hard link to nothing": write_tar([Entry("a", "hardlink", target="no/such")]),
    "C37 an HTML page": b"<!DOCTYPE html><html>" + b"not found " * 200,
    "C37 an ELF file": b"\x7fELF" + bytes(range(256)) * 8,
}


def refused(cubecache: Cubecache, image: str) -> str:
    answer = cubecache.run("preload", image, "--json", expect=None)
    assert answer.code in REFUSED, f"{answer}"
    assert cubecache.run("images", "--json").json() == []
    left = [str(path) for path in cubecache.state.rglob("*") if "partial" in path.name]
    assert not left
    return answer.err + answer.out


@pytest.mark.parametrize("row", MANIFESTS)
def test_a_bad_manifest_is_refused(cubecache: Cubecache, tmp_path: Path, row: str) -> None:
    """B3, B5, B6, B9, B11, B12, B13, B15, A24: a typed error, nothing published."""
    folder = small(tmp_path / "image")
    edit_manifest(folder, MANIFESTS[row])
    assert refused(cubecache, reference(folder))


@pytest.mark.parametrize("row", RAW_MANIFESTS)
def test_a_manifest_that_is_no_manifest_is_refused(
    cubecache: Cubecache, tmp_path: Path, row: str
) -> None:
    """B1, B2: broken or oversized JSON is refused and no RecursionError escapes."""
    folder = small(tmp_path / "image")
    set_manifest(folder, RAW_MANIFESTS[row])
    assert refused(cubecache, reference(folder))


@pytest.mark.parametrize("row", LAYERS)
def test_a_bad_layer_is_refused(cubecache: Cubecache, tmp_path: Path, row: str) -> None:
    """C6, C7, C9, C14, C37: a layer that is no tar, is cut short, or climbs out."""
    good = write_tar([Entry("good", content=b"good" * 3000)])
    assert refused(cubecache, write_tars(tmp_path / "image", [good, LAYERS[row]]))


def test_content_that_does_not_match_its_digest_is_refused(
    cubecache: Cubecache, tmp_path: Path
) -> None:
    """A20, A12: a blob with other bytes, or cut short, is refused and named."""
    folder = small(tmp_path / "image")
    layer = layer_blobs(folder)[1]
    content = layer.read_bytes()
    layer.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert layer.name[:12] in refused(cubecache, reference(folder))
    layer.write_bytes(content[:-5])
    assert layer.name[:12] in refused(cubecache, reference(folder))


def test_a_layer_that_is_not_its_diff_id_is_refused(cubecache: Cubecache, tmp_path: Path) -> None:
    """B12: a diff id that the layer's plaintext does not have."""
    folder = small(tmp_path / "image")
    edit_config(
        folder, lambda config: config["rootfs"]["diff_ids"].__setitem__(0, f"sha256:{1:064}")
    )
    assert refused(cubecache, reference(folder))


def test_an_index_without_this_platform_says_so(cubecache: Cubecache, tmp_path: Path) -> None:
    """B7, B8: no platform fits: the message lists what there is; attestations do not count."""
    folder = small(tmp_path / "image")
    edit_config(folder, lambda config: config.update(architecture="s390x"))
    index = json.loads((folder / "index.json").read_bytes())
    inner = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            index["manifests"][0]
            | {"annotations": {}, "platform": {"architecture": "s390x", "os": "linux"}},
            index["manifests"][0]
            | {"annotations": {}, "platform": {"architecture": "unknown", "os": "unknown"}},
        ],
    }
    raw = json.dumps(inner).encode()
    index["manifests"] = [
        {
            "mediaType": inner["mediaType"],
            "digest": add_blob(folder, raw),
            "size": len(raw),
            "annotations": {"org.opencontainers.image.ref.name": "latest"},
        }
    ]
    (folder / "index.json").write_text(json.dumps(index))
    assert "s390x" in refused(cubecache, reference(folder))
    found = cubecache.run("preload", reference(folder), "--platform", "linux/s390x", "--json")
    assert found.lines()[0]["chunks"] > 0


def test_odd_but_legal_images_work(cubecache: Cubecache, tmp_path: Path) -> None:
    """B9, C38: no layers, an empty layer, the same layer twice."""
    tar = write_tar([directory("d"), Entry("d/f", content=b"f")])
    empty = bytes(1024)
    for number, tars in enumerate(([], [empty], [b""], [tar, tar], [tar, empty, tar])):
        image = write_tars(tmp_path / str(number), tars)
        assert cubecache.preload(image)["size_bytes"] > 0
        cubecache.run("verify", image)


def test_any_compression_whatever_the_media_type_says(cubecache: Cubecache, tmp_path: Path) -> None:
    """B14: gzip, zstd and none give one block image; a wrong label is sniffed."""
    entries = [[Entry("f", content=b"content" * 5000)]]
    found = set()
    for compression in ("gzip", "zstd", "none"):
        folder = tmp_path / compression
        image = write_image(folder, entries, compression=compression)
        first = cubecache.preload(image)

        def mislabel(manifest: dict[str, Any]) -> None:
            manifest["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip"

        edit_manifest(folder, mislabel)
        second = cubecache.preload(image)
        found |= {first["size_bytes"], second["size_bytes"]}
        assert second["new_chunks"] == 0
    assert len(found) == 1
