"""Image indexes and image manifests, OCI's and docker's: bytes in, frozen dataclasses out.

Sources: OCI image index and image manifest specifications; docker manifest v2 schema 2. A body
that could be read as two kinds (CVE-2021-41190), or as another kind than the server or the
descriptor said, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from imagecache.errors import LimitExceeded, NotFound, Rejected, Unsupported
from imagecache.oci import mediatypes
from imagecache.oci.config import ImageConfig, parse_config
from imagecache.oci.descriptor import (
    Descriptor,
    as_list,
    media_type,
    parse_descriptor,
    string_map,
    text,
)
from imagecache.oci.mediatypes import LayerKind, layer_kind
from imagecache.oci.platform import Platform, fitness
from imagecache.oci.settings import RegistryLimits
from imagecache.oci.strictjson import Json, parse_object

__all__ = [
    "Descriptor",
    "ImageConfig",
    "ImageIndex",
    "ImageManifest",
    "NoPlatform",
    "check_image",
    "choose",
    "parse_config",
    "parse_manifest",
]

_REFERENCE_TYPE = "vnd.docker.reference.type"


class NoPlatform(NotFound):
    """The image exists, and not for the platform that was asked for."""


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """A list of manifests, usually one per platform."""

    media_type: str
    manifests: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """One image: its configuration and its layers, lowest first."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)


Parsed: TypeAlias = ImageIndex | ImageManifest


def parse_manifest(raw: bytes, told: str | None, *, limits: RegistryLimits, what: str) -> Parsed:
    """Parse a manifest or index; `told` is the Content-Type or the descriptor's media type.

    Raises `Rejected` (broken or two-faced), `LimitExceeded`, `Unsupported` (schema 1).
    """
    members = parse_object(raw, limit=limits.manifest_bytes, what=what)
    kind = _kind(members, told, what)
    if kind in mediatypes.INDEXES:
        entries = as_list(
            members.get("manifests"), f"{what}: manifests", limit=limits.index_entries
        )
        return ImageIndex(
            kind,
            tuple(
                parse_descriptor(entry, f"{what}: manifests[{position}]")
                for position, entry in enumerate(entries)
            ),
        )
    artifact = text(members.get("artifactType"), f"{what}: artifactType")
    listed = members.get("layers")
    layers = as_list([] if listed is None else listed, f"{what}: layers", limit=limits.layers)
    config = parse_descriptor(
        members.get("config"), f"{what}: config", max_size=limits.config_bytes
    )
    if config.media_type not in mediatypes.CONFIGS:
        raise Rejected(
            f"{what} is not a container image but an artifact of type "
            f"{artifact or config.media_type!a}",
            remedy="name a container image",
        )
    return ImageManifest(
        kind,
        config,
        tuple(
            parse_descriptor(layer, f"{what}: layers[{position}]", max_size=limits.blob_bytes)
            for position, layer in enumerate(layers)
        ),
        string_map(members.get("annotations"), f"{what}: annotations"),
    )


def _kind(members: dict[str, Json], told: str | None, what: str) -> str:
    """The one media type of a body, from what was told, what it says and what it has."""
    own = media_type(members["mediaType"], what) if members.get("mediaType") is not None else None
    said = (told or "").partition(";")[0].strip().lower()
    version = members.get("schemaVersion")
    if version == 1 or said in mediatypes.SCHEMA1 or own in mediatypes.SCHEMA1:
        raise Unsupported(
            f"{what} is of docker's schema 1: unsupported schema1",
            remedy="push the image again with a current tool",
        )
    if version is not None and (type(version) is not int or version != 2):
        raise Rejected(f"{what} has a schemaVersion that is not 2")
    if "manifests" in members and ("layers" in members or "config" in members):
        raise Rejected(f"{what} is both an index and a manifest")
    if "fsLayers" in members or "history" in members:
        raise Rejected(f"{what} mixes schema 1 with a later one")
    if own is not None and said not in mediatypes.UNTOLD and own != said:
        raise Rejected(f"{what} calls itself {own!a}, and was given as {said[:120]!a}")
    kind = own if own is not None else said
    if kind in mediatypes.UNTOLD:
        kind = mediatypes.OCI_INDEX if "manifests" in members else mediatypes.OCI_MANIFEST
    if kind in mediatypes.INDEXES:
        if "manifests" not in members:
            raise Rejected(f"{what} is called an index and has no manifests")
    elif kind not in mediatypes.MANIFESTS:
        raise Rejected(
            f"{what} is not a container image: media type {kind[:120]!a}",
            remedy="name a container image",
        )
    elif "config" not in members:
        raise Rejected(f"{what} is called a manifest and has no config")
    return kind


def choose(index: ImageIndex, wanted: Platform, what: str) -> tuple[Descriptor, ...]:
    """The entries of an index to try for a platform, best first; raises `NoPlatform`.

    Attestations, entries of unknown platforms and of unknown media types are passed over.
    Entries without a platform (nested indexes, single images) come last, in order.
    """
    ranked: list[tuple[int, int, Descriptor]] = []
    offered: list[str] = []
    for position, entry in enumerate(index.manifests):
        if entry.media_type not in mediatypes.INDEXES | mediatypes.MANIFESTS:
            continue
        if _REFERENCE_TYPE in entry.annotations:
            continue
        if entry.platform is None:
            ranked.append((-1, position, entry))
            continue
        if "unknown" in (entry.platform.os, entry.platform.architecture):
            continue
        offered.append(str(entry.platform))
        rank = fitness(wanted, entry.platform)
        if rank is not None:
            ranked.append((rank, position, entry))
    if not ranked:
        raise no_platform(what, wanted, offered)
    ranked.sort(key=lambda row: (-row[0], row[1]))
    return tuple(row[2] for row in ranked)


def no_platform(what: str, wanted: Platform, offered: list[str]) -> NoPlatform:
    """The error for an image that is not made for the wanted platform."""
    names = ", ".join(ascii(name)[1:-1] for name in sorted(set(offered))[:16])
    return NoPlatform(
        f"{what} has no image for platform {wanted}",
        remedy=f"--platform, one of: {names}" if names else "it offers no platform at all",
    )


def check_image(manifest: ImageManifest, config: ImageConfig, wanted: Platform, what: str) -> None:
    """Check a manifest against its configuration and the platform that was asked for.

    Raises `Rejected` for layers that are not file systems or do not pair with the diff ids,
    `NoPlatform` for another platform.
    """
    for layer in manifest.layers:
        kind = layer_kind(layer.media_type)
        if kind is LayerKind.ENCRYPTED:
            raise Rejected(
                f"{what} has an encrypted layer {layer.digest}", remedy="push it decrypted"
            )
        if kind is LayerKind.UNKNOWN:
            raise Rejected(
                f"{what} is not a container image: layer {layer.digest} is of type "
                f"{layer.media_type!a}",
                remedy="name a container image",
            )
    if len(config.diff_ids) != len(manifest.layers):
        raise Rejected(
            f"{what} has {len(manifest.layers)} layers and {len(config.diff_ids)} diff ids"
        )
    total = sum(layer.size for layer in manifest.layers)
    if total > 2**63 - 1:
        raise LimitExceeded(f"{what} has layers of {total} bytes together")
    made_for = config.platform
    if made_for.os and made_for.architecture and fitness(wanted, made_for) is None:
        raise no_platform(what, wanted, [str(made_for)])
