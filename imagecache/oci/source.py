"""Where images come from: one protocol, and the function that picks what implements it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from imagecache.oci.archive import ArchiveSource
from imagecache.oci.descriptor import Descriptor
from imagecache.oci.layout import LayoutSource
from imagecache.oci.platform import Platform
from imagecache.oci.reference import ArchiveReference, LayoutReference, Reference
from imagecache.oci.registry import RegistrySource
from imagecache.oci.resolution import ImageLayer, ResolvedImage
from imagecache.oci.settings import RegistryLimits, RegistrySettings

__all__ = [
    "ImageLayer",
    "ImageSource",
    "RegistryLimits",
    "RegistrySettings",
    "ResolvedImage",
    "open_source",
]


class ImageSource(Protocol):
    """One reference's images and blobs; used inside one event loop, ended by `close()`."""

    async def resolve(self, platform: Platform) -> ResolvedImage:
        """The one image for a platform, its manifest and configuration verified.

        Raises `NotFound`, `Rejected`, `LimitExceeded`, `Unsupported`, `Denied`, `Unavailable`.
        """

    async def fetch_blob(
        self, descriptor: Descriptor, target: Path, progress: Callable[[int], None]
    ) -> None:
        """Bring a blob to `target`: size and digest verified, durable, renamed into place.

        Until then it grows in `target` + ".partial". `progress(n)`: the first n bytes of that
        file are written and hashed, in order, and may be read by a tail (as yet unproven: the
        digest is judged at the end); a lower n than before means that it began anew. An
        interruption leaves the partial file for the next call; a rejection removes it. One
        caller per target at a time, others get `Busy`.
        """

    async def close(self) -> None:
        """Give back connections, threads and files; no call may be under way."""


def open_source(reference: Reference, settings: RegistrySettings) -> ImageSource:
    """The source for a reference; call it inside the running loop. Opens nothing yet."""
    if isinstance(reference, LayoutReference):
        return LayoutSource(reference, settings)
    if isinstance(reference, ArchiveReference):
        return ArchiveSource(reference, settings)
    return RegistrySource(reference, settings)
