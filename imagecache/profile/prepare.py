"""What is done for an image's start ahead of it: plan, build, store. Used by builder and daemon."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from imagecache.blockimage.keys import SealedKind
from imagecache.blockimage.layerindex import LayerIndex
from imagecache.blockimage.locations import LocationTable
from imagecache.blockimage.manifest import BlockManifest
from imagecache.blockimage.records import RootRecord, StartRecord
from imagecache.cache.image import ImageMap
from imagecache.catalog import Catalog
from imagecache.errors import CubecacheError, Rejected
from imagecache.flatten.filetable import FileTable
from imagecache.flatten.limits import STORED
from imagecache.imageview import ImageView
from imagecache.profile.builder import BootBuilder, Local
from imagecache.profile.chunkreader import ChunkReader
from imagecache.profile.mapping import Files, ordinals_of
from imagecache.profile.merge import carry_over
from imagecache.profile.predict.predictor import Program, ReadDisk, predict
from imagecache.profile.profile import Profile
from imagecache.profile.starts import GetSealed, KnownStart, Starts
from imagecache.store.base import RangeReader

log = logging.getLogger(__name__)

MAX_INDEX = 1 << 30


class ImageNames(Protocol):
    """What names an image's objects; a root record and the daemon's export record both do."""

    @property
    def image(self) -> str: ...  # manifest digest
    @property
    def block_image(self) -> str: ...
    @property
    def locations(self) -> str: ...
    @property
    def generation(self) -> int: ...


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadedImage:
    """One image as start-ups need it: its files, its chunks and where they are."""

    root: ImageNames
    view: ImageView
    map: ImageMap
    stored_lengths: Sequence[int]

    @property
    def block_image(self) -> bytes:
        """The block image's digest."""
        return bytes.fromhex(self.root.block_image)


async def load_image(
    catalog: Catalog, root: ImageNames, get_sealed: GetSealed | None = None
) -> LoadedImage:
    """An image's manifest, tables and locations; `get_sealed` may answer from a cache."""

    async def sealed(kind: SealedKind, name: bytes) -> bytes:
        if get_sealed is None:
            return await catalog.sealed(kind, name, root.generation)
        return await get_sealed(catalog.keys.sealed(kind, name, root.generation), name, MAX_INDEX)

    raw_manifest, raw_locations = await asyncio.gather(
        sealed("manifests", bytes.fromhex(root.block_image)),
        sealed("locations", bytes.fromhex(root.locations)),
    )
    manifest = await asyncio.to_thread(BlockManifest.decode, raw_manifest)
    raw_indexes = await asyncio.gather(
        *(sealed("indexes", layer.index) for layer in manifest.layers)
    )
    return await asyncio.to_thread(
        lambda: _loaded(catalog, root, manifest, raw_locations, raw_indexes)
    )


def _loaded(
    catalog: Catalog,
    root: ImageNames,
    manifest: BlockManifest,
    raw_locations: bytes,
    raw_indexes: Sequence[bytes],
) -> LoadedImage:
    locations = LocationTable.decode(raw_locations)
    tables = [_table(raw) for raw in raw_indexes]
    return LoadedImage(
        root=root,
        view=ImageView(manifest, tables),
        map=ImageMap(manifest, locations, catalog.keys.pack, catalog.seals),
        stored_lengths=locations.stored_lengths,
    )


def _table(raw_index: bytes) -> FileTable:
    return FileTable.decode(LayerIndex.decode(raw_index).file_table, STORED)


async def program_of(catalog: Catalog, root: RootRecord) -> Program:
    """What the image's config says is run; Corrupt where the stored config is not the image's."""
    return program_in(json.loads(await catalog.blob(root.config, root.generation)))


def program_in(config: object) -> Program:
    """The program of an OCI image config's JSON; what is not of its form counts as absent."""
    run = config.get("config") if isinstance(config, dict) else None
    run = run if isinstance(run, dict) else {}

    def texts(name: str) -> tuple[str, ...]:
        value = run.get(name)
        if not isinstance(value, list):
            return ()
        return tuple(item for item in value[:4096] if isinstance(item, str))

    directory = run.get("WorkingDir")
    return Program(
        arguments=(*texts("Entrypoint"), *texts("Cmd")),
        environment=texts("Env"),
        working_directory=directory if isinstance(directory, str) else "",
    )


def carried(known: KnownStart, image: LoadedImage) -> Profile:
    """A start of this or another version as this image's profile."""
    size_of = Files(image.view).size_blocks
    return carry_over(known.profile, image.root.image, image.block_image, size_of)


def with_prediction(profile: Profile, predicted: Profile) -> Profile:
    """A carried profile, then what the prediction adds: files that no recording has seen."""
    known = {touch.path for touch in profile.touches}
    extra = tuple(touch for touch in predicted.touches if touch.path not in known)
    return replace(profile, touches=profile.touches + extra)


class StartBuilder:
    """Makes and stores starts: profile, boot pack, table, record."""

    def __init__(
        self,
        catalog: Catalog,
        starts: Starts,
        reader: RangeReader,
        *,
        scratch: Path,
        local: Local | None = None,
    ) -> None:
        """`local` gives chunks that the host has; `scratch` holds a pack while it is written."""
        self._catalog = catalog
        self._starts = starts
        self._reader = reader
        self._scratch = scratch
        self._local = local

    async def build(self, repository: str, image: LoadedImage, profile: Profile) -> StartRecord:
        """Builds the boot pack of a profile and stores both."""
        ordinals = await asyncio.to_thread(ordinals_of, image.view, profile, image.stored_lengths)
        builder = BootBuilder(
            self._catalog.store,
            self._reader,
            self._catalog.keys,
            scratch=self._scratch,
            local=self._local,
            pack_key=self._catalog.seals.pack_key,
        )
        name = self._starts.name_of(profile)
        generation = await self._catalog.active_generation()
        table = await builder.build(
            image.map,
            ordinals,
            block_image=image.block_image,
            profile=name,
            generation=generation,
        )
        return await self._starts.save(repository, profile, table, generation)

    async def predict(
        self, image: LoadedImage, program: Program, read: ReadDisk | None = None
    ) -> Profile:
        """What the image's program will load; reads the image through its own chunks."""
        read = read or ChunkReader(image.map, self._reader).read
        return await predict(image.view, image.root.image, image.block_image, program, read)

    async def prepare(self, repository: str, root: RootRecord) -> StartRecord | None:
        """After a preload: gives an image that has no start of its own one.

        From the profile of the repository's last version, carried over, and from a prediction.
        None where it has one for this block image, in the generation that is being written.
        """
        known = await self._starts.find(repository, root.image)
        if known is not None and known.own and known.record.block_image == root.block_image:
            if known.generation >= root.generation:
                return None
            return await self.build(
                repository, await load_image(self._catalog, root), known.profile
            )
        image = await load_image(self._catalog, root)
        try:
            profile = await self.predict(image, await program_of(self._catalog, root))
        except Rejected as error:
            log.info("the start of %s cannot be predicted: %s", root.image, error)
            profile = Profile(root.image, image.block_image, 0, (), ())
        if known is not None:
            profile = with_prediction(carried(known, image), profile)
        return await self.build(repository, image, profile)


async def prepare_quietly(builder: StartBuilder, repository: str, root: RootRecord) -> None:
    """As `prepare`; a failure costs time at the next start and nothing else."""
    try:
        await builder.prepare(repository, root)
    except CubecacheError as error:
        log.warning("nothing could be prepared for the start of %s: %s", root.image, error)
