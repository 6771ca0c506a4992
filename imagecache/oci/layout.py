"""An OCI image layout directory as an image source.

Source: OCI image layout specification. File names inside it are made from checked digests
alone; every blob is verified while it is copied, so what the directory claims is never trusted.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imagecache.errors import NotFound, Rejected, Unsupported
from imagecache.oci import mediatypes
from imagecache.oci.descriptor import Descriptor, as_list, parse_descriptor
from imagecache.oci.digest import Digest
from imagecache.oci.download import Progress
from imagecache.oci.files import copy_in_thread, copy_verified, open_regular, read_regular
from imagecache.oci.manifest import ImageIndex
from imagecache.oci.platform import Platform
from imagecache.oci.reference import LayoutReference
from imagecache.oci.resolution import Received, ResolvedImage, resolve_entries
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.strictjson import parse_object

_REF_NAME = "org.opencontainers.image.ref.name"
_MARKER_LIMIT = 64 * 1024
_WORKERS = 2


class LayoutSource:
    """Images of one layout directory."""

    def __init__(self, reference: LayoutReference, settings: RegistrySettings) -> None:
        self._reference = reference
        self._limits = settings.limits
        self._executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="oci-layout")

    async def close(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def resolve(self, platform: Platform) -> ResolvedImage:
        """Resolve the tag, or the directory's only image; raises as `resolve_entries` does."""
        loop = asyncio.get_running_loop()
        entries = await loop.run_in_executor(self._executor, self._entries)
        name = self._reference.canonical
        index = ImageIndex(mediatypes.OCI_INDEX, self._chosen(entries))
        return await resolve_entries(self, index, name=name, wanted=platform, limits=self._limits)

    async def read_manifest(self, descriptor: Descriptor) -> Received:
        """Part of `ManifestReader`."""
        raw = await self._small(descriptor, self._limits.manifest_bytes)
        return Received(raw, descriptor.digest, None)

    async def read_config(self, descriptor: Descriptor) -> bytes:
        """Part of `ManifestReader`."""
        return await self._small(descriptor, self._limits.config_bytes)

    async def fetch_blob(self, descriptor: Descriptor, target: Path, progress: Progress) -> None:
        """Copy a blob to `target`, verified; raises `NotFound`, `Rejected`, `NoSpace`."""

        def copy(report: Progress) -> None:
            self._copy(descriptor, target, report)

        await copy_in_thread(self._executor, copy, progress)

    def _copy(self, descriptor: Descriptor, target: Path, report: Progress) -> None:
        path = self._blob_path(descriptor.digest)
        file = open_regular(path)
        try:
            copy_verified(file, 0, descriptor, target, report, what=f"blob {path}")
        finally:
            os.close(file)

    async def _small(self, descriptor: Descriptor, limit: int) -> bytes:
        path = self._blob_path(descriptor.digest)
        loop = asyncio.get_running_loop()
        raw = await loop.run_in_executor(self._executor, lambda: read_regular(path, limit=limit))
        return descriptor.verify(raw, str(path))

    def _blob_path(self, digest: Digest) -> Path:
        return self._reference.path / "blobs" / digest.algorithm / digest.hex

    def _entries(self) -> tuple[Descriptor, ...]:
        """The descriptors of index.json, after a check of the layout's marker."""
        root = self._reference.path
        marker = root / "oci-layout"
        if not root.is_dir():
            raise NotFound(f"there is no directory {root}")
        try:
            version = parse_object(
                read_regular(marker, limit=_MARKER_LIMIT), limit=_MARKER_LIMIT, what=str(marker)
            ).get("imageLayoutVersion")
        except NotFound:
            raise NotFound(
                f"{root} is not an OCI image layout: it has no file oci-layout"
            ) from None
        if not isinstance(version, str) or not version.startswith("1."):
            raise Unsupported(f"{root} is an image layout of version {version!a}, not 1.x")
        path = root / "index.json"
        limit = self._limits.manifest_bytes
        members = parse_object(read_regular(path, limit=limit), limit=limit, what=str(path))
        if members.get("schemaVersion") not in (None, 2) or "layers" in members:
            raise Rejected(f"{path} is not an image index")
        listed = as_list(
            members.get("manifests"), f"{path}: manifests", limit=self._limits.index_entries
        )
        return tuple(
            parse_descriptor(entry, f"{path}: manifests[{position}]")
            for position, entry in enumerate(listed)
        )

    def _chosen(self, entries: tuple[Descriptor, ...]) -> tuple[Descriptor, ...]:
        """The entries that the reference may mean; more than one only if nothing names them."""
        path = self._reference.path
        images = [
            entry
            for entry in entries
            if entry.media_type in mediatypes.INDEXES | mediatypes.MANIFESTS
        ]
        names = sorted({entry.annotations.get(_REF_NAME, "") for entry in images} - {""})
        shown = ", ".join(ascii(name)[1:-1] for name in names[:16])
        tag = self._reference.tag
        if tag is not None:
            found = [entry for entry in images if entry.annotations.get(_REF_NAME) == tag]
            if not found:
                raise NotFound(
                    f"{path} has no image {tag}", remedy=f"it has: {shown}" if shown else None
                )
            return tuple(found)
        if not images:
            raise NotFound(f"{path} holds no image")
        if len(names) > 1:
            raise NotFound(
                f"{path} holds several images", remedy=f"name one, oci:{path}:TAG, of: {shown}"
            )
        return tuple(images)
