"""Small images made by hand: in memory, as layouts, as docker archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"


def sha256(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


def layer_tar(files: dict[str, bytes]) -> bytes:
    """A deterministic layer."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return out.getvalue()


def packed(tar: bytes) -> bytes:
    return gzip.compress(tar, mtime=0)


def descriptor(body: bytes, media_type: str, **more: object) -> dict:
    return {"mediaType": media_type, "digest": sha256(body), "size": len(body), **more}


@dataclass
class Image:
    """`digest` names the top manifest; blobs and manifests are by digest."""

    digest: str
    manifests: dict[str, tuple[bytes, str]]
    blobs: dict[str, bytes] = field(default_factory=dict)

    @property
    def top(self) -> bytes:
        return self.manifests[self.digest][0]

    def descriptor(self, **more: object) -> dict:
        body, media_type = self.manifests[self.digest]
        return descriptor(body, media_type, **more)


def make_image(
    layers: list[dict[str, bytes]] | None = None,
    *,
    os: str = "linux",
    architecture: str = "amd64",
    variant: str | None = None,
    compress: bool = True,
    run: dict | None = None,
    manifest_edits: dict | None = None,
    config_edits: dict | None = None,
) -> Image:
    """An image of tar layers; the edits replace members of the manifest and the config."""
    if layers is None:
        layers = [{"etc/hello": b"hello\n"}, {"usr/bin/x": b"x" * 3000}]
    tars = [layer_tar(files) for files in layers]
    stored = [packed(tar) if compress else tar for tar in tars]
    config: dict = {
        "os": os,
        "architecture": architecture,
        "rootfs": {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]},
        "config": run or {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
    }
    if variant:
        config["variant"] = variant
    config_raw = json.dumps(config | (config_edits or {})).encode()
    media_type = OCI_LAYER + ("+gzip" if compress else "")
    manifest: dict = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(config_raw, OCI_CONFIG),
        "layers": [descriptor(body, media_type) for body in stored],
    }
    raw = json.dumps(manifest | (manifest_edits or {})).encode()
    blobs = {sha256(body): body for body in [config_raw, *stored]}
    return Image(sha256(raw), {sha256(raw): (raw, OCI_MANIFEST)}, blobs)


def make_index(entries: list[tuple[Image, dict]]) -> Image:
    """An index over images; each entry's dict is merged into its descriptor."""
    raw = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [image.descriptor() | extra for image, extra in entries],
        }
    ).encode()
    manifests = {sha256(raw): (raw, OCI_INDEX)}
    blobs: dict[str, bytes] = {}
    for image, _ in entries:
        manifests |= image.manifests
        blobs |= image.blobs
    return Image(sha256(raw), manifests, blobs)


def write_layout(root: Path, images: dict[str | None, Image]) -> Path:
    """An OCI layout; the keys are the ref names."""
    store = root / "blobs" / "sha256"
    store.mkdir(parents=True)
    (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    entries = []
    for name, image in images.items():
        more = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
        entries.append(image.descriptor(**more))
        for digest, body in [
            *image.blobs.items(),
            *((d, m[0]) for d, m in image.manifests.items()),
        ]:
            (store / digest[7:]).write_bytes(body)
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    return root


def write_archive(path: Path, images: dict[str, list[dict[str, bytes]]]) -> Path:
    """A docker archive with images of plain layers, the names as their tags."""
    table = []
    with tarfile.open(path, "w") as tar:

        def add(name: str, body: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))

        for tag, layers in images.items():
            tars = [layer_tar(files) for files in layers]
            config = json.dumps(
                {
                    "os": "linux",
                    "architecture": "amd64",
                    "rootfs": {"type": "layers", "diff_ids": [sha256(body) for body in tars]},
                    "config": {"Cmd": ["/bin/sh"]},
                }
            ).encode()
            names = [f"{sha256(body)[7:]}/layer.tar" for body in tars]
            for name, body in zip(names, tars, strict=True):
                add(name, body)
            config_name = f"{sha256(config)[7:]}.json"
            add(config_name, config)
            table.append({"Config": config_name, "RepoTags": [tag], "Layers": names})
        add("manifest.json", json.dumps(table).encode())
    return path
