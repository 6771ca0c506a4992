"""From the first manifest of a source down to one image for one platform, all verified.

The same walk serves registries, layouts and archives: they differ in how a manifest's or a
small blob's bytes are read, which is what `ManifestReader` stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from imagecache.errors import LimitExceeded, Rejected
from imagecache.oci import mediatypes
from imagecache.oci.descriptor import Descriptor
from imagecache.oci.digest import Digest
from imagecache.oci.manifest import (
    ImageConfig,
    ImageIndex,
    ImageManifest,
    NoPlatform,
    check_image,
    choose,
    parse_config,
    parse_manifest,
)
from imagecache.oci.platform import Platform
from imagecache.oci.settings import RegistryLimits

_MAX_MANIFESTS = 32


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """A layer: the blob as stored, and the digest of its uncompressed tar stream."""

    descriptor: Descriptor
    diff_id: Digest


@dataclass(frozen=True, slots=True)
class ResolvedImage:
    """One image for one platform; `digest` is that of `manifest_raw`, layers are lowest first."""

    name: str
    digest: Digest
    manifest: ImageManifest
    manifest_raw: bytes = field(repr=False)
    config: ImageConfig
    config_raw: bytes = field(repr=False)
    layers: tuple[ImageLayer, ...]


@dataclass(frozen=True, slots=True)
class Received:
    """A manifest's bytes, their own digest, and the media type that came beside them, if any."""

    raw: bytes
    digest: Digest
    told: str | None


class ManifestReader(Protocol):
    """Reads the small objects of one source; every method returns verified bytes or raises."""

    async def read_manifest(self, descriptor: Descriptor) -> Received:
        """The manifest or index that a descriptor names, verified against it."""

    async def read_config(self, descriptor: Descriptor) -> bytes:
        """The configuration that a manifest names, verified against its descriptor."""


class _Walk:
    """One resolve: what it has seen so far, so that loops and floods end."""

    def __init__(
        self, reader: ManifestReader, name: str, wanted: Platform, limits: RegistryLimits
    ) -> None:
        self._reader = reader
        self._name = name
        self._wanted = wanted
        self._limits = limits
        self._read = 0

    async def image(
        self, received: Received, above: tuple[Digest, ...], what: str
    ) -> ResolvedImage:
        """The image that a received manifest is, or leads to."""
        parsed = parse_manifest(received.raw, received.told, limits=self._limits, what=what)
        if isinstance(parsed, ImageIndex):
            if received.digest in above:
                raise Rejected(f"{what} contains itself")
            above = (*above, received.digest)
            if len(above) > self._limits.index_depth:
                raise LimitExceeded(
                    f"{what} is nested deeper than {self._limits.index_depth} indexes"
                )
            return await self.entry(parsed, above, what)
        what = f"image {self._name} ({received.digest})"
        config_raw = await self._reader.read_config(parsed.config)
        parsed.config.verify(config_raw, f"the config of {what}")
        config = parse_config(
            config_raw,
            limit=self._limits.config_bytes,
            max_layers=self._limits.layers,
            what=f"the config of {what}",
        )
        check_image(parsed, config, self._wanted, what)
        layers = tuple(
            ImageLayer(layer, diff_id)
            for layer, diff_id in zip(parsed.layers, config.diff_ids, strict=True)
        )
        return ResolvedImage(
            self._name, received.digest, parsed, received.raw, config, config_raw, layers
        )

    async def entry(self, index: ImageIndex, above: tuple[Digest, ...], what: str) -> ResolvedImage:
        """The image of the best entry of an index."""
        missing: NoPlatform | None = None
        for entry in choose(index, self._wanted, what):
            try:
                return await self._follow(entry, above)
            except NoPlatform as error:
                # An entry that named its platform was the answer; one that did not was a guess.
                if entry.platform is not None:
                    raise
                missing = missing or error
        raise missing or NoPlatform(f"{what} has no image for platform {self._wanted}")

    async def _follow(self, entry: Descriptor, above: tuple[Digest, ...]) -> ResolvedImage:
        what = f"manifest {entry.digest} of {self._name}"
        if entry.digest in above:
            raise Rejected(f"{what} contains itself")
        self._read += 1
        if self._read > _MAX_MANIFESTS:
            raise LimitExceeded(f"{self._name} leads through more than {_MAX_MANIFESTS} manifests")
        if entry.size > self._limits.manifest_bytes:
            raise LimitExceeded(f"{what} has more than {self._limits.manifest_bytes} bytes")
        received = await self._reader.read_manifest(entry)
        entry.verify(received.raw, what)
        said = (received.told or "").partition(";")[0].strip().lower()
        if said in mediatypes.UNTOLD:
            received = Received(received.raw, entry.digest, entry.media_type)
        elif said != entry.media_type:
            raise Rejected(
                f"{what} is given as {said[:120]!a}, its descriptor says {entry.media_type!a}"
            )
        return await self.image(received, above, what)


async def resolve_top(
    reader: ManifestReader,
    received: Received,
    *,
    name: str,
    wanted: Platform,
    limits: RegistryLimits,
) -> ResolvedImage:
    """Resolve from a manifest or index already in hand; `name` names the image in errors.

    Raises `Rejected`, `LimitExceeded`, `Unsupported`, `NoPlatform`, and what the reader raises.
    """
    return await _Walk(reader, name, wanted, limits).image(received, (), f"manifest of {name}")


async def resolve_entries(
    reader: ManifestReader,
    index: ImageIndex,
    *,
    name: str,
    wanted: Platform,
    limits: RegistryLimits,
) -> ResolvedImage:
    """Resolve from entries that stand in no blob of their own (a layout's index.json)."""
    return await _Walk(reader, name, wanted, limits).entry(index, (), name)
