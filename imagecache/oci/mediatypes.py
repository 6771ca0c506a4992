"""The media types we read. Sources: OCI image specification, docker manifest v2 schema 2."""

from __future__ import annotations

from enum import Enum

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
_OCI_NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"

INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
SCHEMA1 = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
# A server that does not know says one of these; the body's own mediaType then decides.
UNTOLD = frozenset({"", "application/json", "application/octet-stream", "text/plain"})

ACCEPT = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST))

_COMPRESSIONS = ("", "+gzip", "+zstd", ".gzip", ".zstd")
_PLAIN_LAYERS = frozenset(base + end for base in (OCI_LAYER, DOCKER_LAYER) for end in _COMPRESSIONS)
_FOREIGN_LAYERS = frozenset(
    base + end for base in (_OCI_NONDISTRIBUTABLE, _DOCKER_FOREIGN) for end in _COMPRESSIONS
)


class LayerKind(Enum):
    """What a layer's media type promises; the bytes' own magic decides the compression (B14)."""

    PLAIN = "plain"
    FOREIGN = "foreign"
    ENCRYPTED = "encrypted"
    UNKNOWN = "unknown"


def layer_kind(media_type: str) -> LayerKind:
    """Classify a layer's media type."""
    if media_type in _PLAIN_LAYERS:
        return LayerKind.PLAIN
    if media_type in _FOREIGN_LAYERS:
        return LayerKind.FOREIGN
    return LayerKind.ENCRYPTED if media_type.endswith("+encrypted") else LayerKind.UNKNOWN
