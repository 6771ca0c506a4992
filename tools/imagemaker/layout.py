"""Writes an OCI image layout (layers, config, manifest, index) and pushes it with skopeo."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import zstandard

_MEDIA = "application/vnd.oci.image."
_PIECE = 1 << 20


@dataclass(frozen=True)
class LayerSource:
    """An uncompressed tar on disk, its compression (`gzip`, `zstd`, `none`) and what made it."""

    tar: Path
    compression: str
    created_by: str


@dataclass(frozen=True)
class Settings:
    """What the image's config says about running it."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    user: str = ""
    working_directory: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def as_config(self) -> dict[str, Any]:
        """The `config` object of an OCI image configuration, empty fields left out."""
        fields: dict[str, Any] = {
            "Cmd": list(self.command),
            "Entrypoint": list(self.entrypoint),
            "Env": list(self.environment),
            "Labels": dict(self.labels),
            "User": self.user,
            "WorkingDir": self.working_directory,
        }
        return {name: value for name, value in fields.items() if value}


def architecture() -> str:
    """This host's architecture in OCI's words."""
    return {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]


def write_layout(
    folder: Path, tag: str, layers: Sequence[LayerSource], settings: Settings, *, epoch: int
) -> str:
    """Makes an OCI layout at `folder` (replacing one) and returns the manifest's digest."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    blobs = temporary / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    descriptors, diff_ids, history = [], [], []
    created = _timestamp(epoch)
    for layer in layers:
        descriptor, diff_id = _add_layer(blobs, layer)
        descriptors.append(descriptor)
        diff_ids.append(diff_id)
        history.append({"created": created, "created_by": layer.created_by})
    config = _add_json(
        blobs,
        {
            "architecture": architecture(),
            "config": settings.as_config(),
            "created": created,
            "history": history,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        },
        _MEDIA + "config.v1+json",
    )
    manifest = _add_json(
        blobs,
        {
            "schemaVersion": 2,
            "mediaType": _MEDIA + "manifest.v1+json",
            "config": config,
            "layers": descriptors,
        },
        _MEDIA + "manifest.v1+json",
    )
    named = manifest | {
        "annotations": {"org.opencontainers.image.ref.name": tag},
        "platform": {"architecture": architecture(), "os": "linux"},
    }
    index = {
        "schemaVersion": 2,
        "mediaType": _MEDIA + "index.v1+json",
        "manifests": [named],
    }
    (temporary / "index.json").write_bytes(_json(index))
    (temporary / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return str(manifest["digest"])


def push(folder: Path, tag: str, destination: str) -> None:
    """Pushes `oci:folder:tag` to `HOST/REPO:TAG` of a loopback registry over plain HTTP.

    Raises `subprocess.CalledProcessError` when skopeo fails.
    """
    subprocess.run(
        [
            "skopeo",
            "--insecure-policy",
            "copy",
            "--quiet",
            "--preserve-digests",
            "--dest-tls-verify=false",
            f"oci:{folder}:{tag}",
            f"docker://{destination}",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )


class _HashedFile:
    """A file that is hashed while it is written, and gets its digest as its name at the end."""

    def __init__(self, blobs: Path) -> None:
        self._blobs = blobs
        self._path = blobs / "partial"
        self._file = self._path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> int:
        self._hash.update(piece)
        self.size += len(piece)
        return self._file.write(piece)

    def finish(self) -> str:
        self._file.close()
        self._path.rename(self._blobs / self._hash.hexdigest())
        return f"sha256:{self._hash.hexdigest()}"


def _add_layer(blobs: Path, layer: LayerSource) -> tuple[dict[str, Any], str]:
    target = _HashedFile(blobs)
    plain = hashlib.sha256()
    with layer.tar.open("rb") as source:
        if layer.compression == "gzip":
            machine = zlib.compressobj(6, zlib.DEFLATED, 31)
            for piece in _pieces(source):
                plain.update(piece)
                target.write(machine.compress(piece))
            target.write(machine.flush())
        elif layer.compression == "zstd":
            compressor = zstandard.ZstdCompressor(level=3)
            writer = cast(
                "AbstractContextManager[Any]",
                compressor.stream_writer(cast("IO[bytes]", target), closefd=False),
            )
            with writer as stream:
                for piece in _pieces(source):
                    plain.update(piece)
                    stream.write(piece)
        else:
            for piece in _pieces(source):
                plain.update(piece)
                target.write(piece)
    suffix = "" if layer.compression == "none" else f"+{layer.compression}"
    digest = target.finish()
    descriptor = {
        "mediaType": f"{_MEDIA}layer.v1.tar{suffix}",
        "digest": digest,
        "size": target.size,
    }
    return descriptor, f"sha256:{plain.hexdigest()}"


def _add_json(blobs: Path, document: dict[str, Any], media_type: str) -> dict[str, Any]:
    target = _HashedFile(blobs)
    target.write(_json(document))
    return {"mediaType": media_type, "digest": target.finish(), "size": target.size}


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _pieces(source: IO[bytes]) -> Iterator[bytes]:
    while piece := source.read(_PIECE):
        yield piece


def _timestamp(epoch: int) -> str:
    return datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
