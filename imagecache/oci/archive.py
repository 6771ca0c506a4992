"""A `docker save` file as an image source.

Source: docker image specification v1.2 (manifest.json: Config, RepoTags, Layers). Such a file
has no image manifest, so one is made from it: an OCI manifest, canonical JSON (sorted keys, no
spaces), media type and digest of the config as docker stores it, and per layer the media type by
its first bytes, the digest of the bytes in the archive and their size. It depends on the
archive's members alone, so the same image saved twice has the same manifest digest; it is not
the digest that a registry gives the image, whose layers are compressed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imagecache.errors import LimitExceeded, NotFound, Rejected, UsageError
from imagecache.oci import mediatypes
from imagecache.oci.archive_members import Member, read_contents
from imagecache.oci.descriptor import Descriptor, as_list, as_object, strings
from imagecache.oci.digest import Digest
from imagecache.oci.download import Progress
from imagecache.oci.files import copy_in_thread, copy_verified, open_regular, read_range
from imagecache.oci.manifest import parse_config
from imagecache.oci.platform import Platform
from imagecache.oci.reference import ArchiveReference, parse_archive_name
from imagecache.oci.resolution import Received, ResolvedImage, resolve_top
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.strictjson import Json, parse_json

_WORKERS = 2
_PIECE = 1 << 20


class ArchiveSource:
    """Images of one docker archive; the file stays open, and is read at offsets."""

    def __init__(self, reference: ArchiveReference, settings: RegistrySettings) -> None:
        self._reference = reference
        self._path = reference.path
        self._limits = settings.limits
        self._executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="oci-archive")
        self._file = -1
        self._places: dict[Digest, Member] = {}

    async def close(self) -> None:
        """Close the file and end the threads."""
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    async def resolve(self, platform: Platform) -> ResolvedImage:
        """Resolve the named image, or the only one; raises as `resolve_top` does."""
        loop = asyncio.get_running_loop()
        received = await loop.run_in_executor(self._executor, self._synthesise)
        return await resolve_top(
            self,
            received,
            name=self._reference.canonical,
            wanted=platform,
            limits=self._limits,
        )

    async def read_manifest(self, descriptor: Descriptor) -> Received:
        """Part of `ManifestReader`; the made manifest has no children."""
        raise NotFound(f"{self._path} has no manifest {descriptor.digest}")

    async def read_config(self, descriptor: Descriptor) -> bytes:
        """Part of `ManifestReader`."""
        member = self._place(descriptor)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, read_range, self._file, member.offset, member.size, self._path
        )

    async def fetch_blob(self, descriptor: Descriptor, target: Path, progress: Progress) -> None:
        """Copy a layer of the resolved image to `target`, verified; raises `Rejected`."""
        member = self._place(descriptor)

        def copy(report: Progress) -> None:
            what = f"layer {descriptor.digest} of {self._path}"
            copy_verified(self._file, member.offset, descriptor, target, report, what=what)

        await copy_in_thread(self._executor, copy, progress)

    def _place(self, descriptor: Descriptor) -> Member:
        member = self._places.get(descriptor.digest)
        if member is None or member.size != descriptor.size:
            raise NotFound(f"{self._path} has no blob {descriptor.digest}")
        return member

    def _synthesise(self) -> Received:
        """Make the manifest of the image that the reference names (see the module's text)."""
        if self._file < 0:
            self._file = open_regular(self._path)
        contents = read_contents(self._file, self._path)
        limit = self._limits.manifest_bytes
        try:
            table = parse_json(
                self._read(contents.find("manifest.json"), limit),
                limit=limit,
                what=f"manifest.json of {self._path}",
            )
        except NotFound:
            raise Rejected(
                f"{self._path} is not a docker archive: it has no manifest.json",
                remedy="write one with docker save, or name a layout with oci:",
            ) from None
        entry = self._entry(table)
        what = f"manifest.json of {self._path}"
        config_name = entry.get("Config")
        if not isinstance(config_name, str):
            raise Rejected(f"{what}: Config is not a name")
        config_member = contents.find(config_name)
        config_raw = self._read(config_member, self._limits.config_bytes)
        config = parse_config(
            config_raw,
            limit=self._limits.config_bytes,
            max_layers=self._limits.layers,
            what=f"{config_name[:120]!a} of {self._path}",
        )
        names = strings(entry.get("Layers"), f"{what}: Layers", limit=self._limits.layers)
        if len(names) != len(config.diff_ids):
            raise Rejected(f"{what} has {len(names)} layers and {len(config.diff_ids)} diff ids")
        config_digest = Digest.of(config_raw)
        self._places = {config_digest: config_member}
        layers = [
            self._layer(contents.find(name), diff_id)
            for name, diff_id in zip(names, config.diff_ids, strict=True)
        ]
        raw = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": mediatypes.OCI_MANIFEST,
                "config": {
                    "mediaType": mediatypes.DOCKER_CONFIG,
                    "digest": str(config_digest),
                    "size": len(config_raw),
                },
                "layers": layers,
            },
            sort_keys=True,
            separators=(",", ":"),
        ).encode("ascii")
        return Received(raw, Digest.of(raw), mediatypes.OCI_MANIFEST)

    def _entry(self, table: Json) -> dict[str, Json]:
        what = f"manifest.json of {self._path}"
        entries = [as_object(node, what) for node in as_list(table, what, limit=1024)]
        names = [
            strings(entry.get("RepoTags"), f"{what}: RepoTags", limit=1024) for entry in entries
        ]
        wanted = self._reference.tag
        shown = ", ".join(ascii(name)[1:-1] for tags in names for name in tags[:4])[:400]
        if wanted is not None:
            for entry, tags in zip(entries, names, strict=True):
                if wanted in {_canonical(tag) for tag in tags}:
                    return entry
            raise NotFound(f"{self._path} has no image {wanted}", remedy=f"it has: {shown}")
        if len(entries) != 1:
            raise NotFound(
                f"{self._path} holds {len(entries)} images",
                remedy=f"name one, docker-archive:FILE:NAME, of: {shown}",
            )
        return entries[0]

    def _layer(self, member: Member, diff_id: Digest) -> dict[str, Json]:
        """A layer's descriptor; a plain tar's digest is its diff id, and copying verifies that."""
        head = os.pread(self._file, 4, member.offset)[: member.size]
        if head.startswith(b"\x1f\x8b"):
            media_type, digest = mediatypes.OCI_LAYER + "+gzip", self._hash(member)
        elif head == b"\x28\xb5\x2f\xfd":
            media_type, digest = mediatypes.OCI_LAYER + "+zstd", self._hash(member)
        else:
            media_type, digest = mediatypes.OCI_LAYER, diff_id
        known = self._places.setdefault(digest, member)
        if known.size != member.size:
            raise Rejected(f"{self._path} has two layers of different size under one digest")
        return {"mediaType": media_type, "digest": str(digest), "size": member.size}

    def _hash(self, member: Member) -> Digest:
        hasher = hashlib.sha256()
        done = 0
        while done < member.size:
            piece = read_range(
                self._file, member.offset + done, min(_PIECE, member.size - done), self._path
            )
            hasher.update(piece)
            done += len(piece)
        return Digest("sha256", hasher.hexdigest())

    def _read(self, member: Member, limit: int) -> bytes:
        if member.size > limit:
            raise LimitExceeded(f"{self._path}: a member of {member.size} bytes, over {limit}")
        return read_range(self._file, member.offset, member.size, self._path)


def _canonical(tag: str) -> str:
    try:
        return parse_archive_name(tag)
    except UsageError:
        return ""
