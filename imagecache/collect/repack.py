"""Re-packing: chunks that should lie elsewhere are copied into new packs, image by image.

It is a build whose source is the store itself: under the image's lease, into the active generation,
packs first, then location tables and layer records, the root last. No identity changes, and the old
packs go by ordinary collection once nothing names them. So a killed run leaves garbage only.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from imagecache.blockimage.extents import ChunkList
from imagecache.blockimage.holdings import LeftRecord
from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.locations import Location, LocationTable, pack_name
from imagecache.blockimage.manifest import Face
from imagecache.blockimage.records import LayerRecord, RootRecord
from imagecache.blockimage.seals import NO_KEY
from imagecache.cache.decode import Wanted, decode_all
from imagecache.catalog import Catalog
from imagecache.chunks import BLOCK, chunk_digest
from imagecache.errors import Corrupt, LimitExceeded, NotFound, Unsupported
from imagecache.leases.build import BuildLease, BuildLeases, LeaseLost
from imagecache.packs.pack import PackWriter
from imagecache.store.base import Priority, RangeReader

RUN_BYTES = 4 << 20
_BROKEN = (NotFound, Corrupt, LimitExceeded, Unsupported)


@dataclass(slots=True)
class RepackReport:
    """What was done; bytes are stored ones."""

    images: list[str] = field(default_factory=list)  # that name new packs now
    left: list[str] = field(default_factory=list)  # in a generation that is not written any more
    failed: dict[str, str] = field(default_factory=dict)  # image -> why
    chunks: int = 0
    moved_bytes: int = 0
    packs: int = 0
    records: int = 0  # small objects that were sealed anew

    def as_json(self) -> dict[str, Any]:
        """The object that commands print with --json."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class _Subject:
    """What has a location table: the disk, or one of its layers with its record."""

    chunks: ChunkList
    table: LocationTable
    layer: LayerRecord | None = None


class Repacker:
    """Re-packs images of one realm; used once."""

    def __init__(
        self,
        catalog: Catalog,
        reader: RangeReader,
        *,
        scratch: Path,
        wanted: Callable[[Location], bool],
        leases: BuildLeases | None = None,
        rewrite: bool = False,
    ) -> None:
        """`wanted` says which places are to be left; `scratch` holds packs while they are written.

        `rewrite` writes the image's small objects again, even where no chunk moves.
        """
        self.report = RepackReport()
        self._catalog = catalog
        self._reader = reader
        self._scratch = scratch
        self._wanted = wanted
        self._leases = leases or BuildLeases(catalog)
        self._rewrite = rewrite
        self._generation = 0
        self._moved: dict[bytes, Location] = {}  # by chunk, into packs of `_generation`

    async def run(self) -> RepackReport:
        """Every image, one after another. Raises Unavailable or Denied of the store."""
        roots = [root async for root in self._catalog.roots()]
        try:
            for root in roots:
                await self._under_lease(root)
        finally:
            await self._clear()
        return self.report

    async def _clear(self) -> None:
        await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)

    def _hold(self, lease: BuildLease) -> AbstractAsyncContextManager[None]:
        return lease.kept()

    async def _under_lease(self, seen: RootRecord) -> None:
        key = ImageKey(seen.image, Face.parse(seen.face), seen.options, seen.format_version)
        lease = await self._leases.meet(key, anew=True)
        if not isinstance(lease, BuildLease):
            raise LeaseLost("a root came where a lease was asked for")
        async with self._hold(lease):
            self._enter(lease.generation)
            try:
                await self._image(lease, await self._current(key, seen, lease))
            except NotFound:
                self.report.left.append(seen.image)
            except LeaseLost as error:
                self.report.failed[seen.image] = str(error)
            except _BROKEN as error:
                self.report.failed[seen.image] = f"{error}; cubecache repair"

    def _enter(self, generation: int) -> None:
        if generation != self._generation:
            self._generation = generation
            self._moved.clear()  # nothing here names packs of another generation's run

    async def _current(self, key: ImageKey, _seen: RootRecord, lease: BuildLease) -> RootRecord:
        """Where packs are named is read after the generation to write into was chosen."""
        return await self._catalog.root_in(key, lease.generation)

    async def _image(self, lease: BuildLease, root: RootRecord) -> None:
        catalog = self._catalog
        manifest = await catalog.block_manifest(root)
        disk = _Subject(manifest.chunks, await catalog.location_table(root))
        layers = [x for x in [await self._layer(d, lease.generation) for d in root.layers] if x]
        subjects = (disk, *layers)
        unmoved = {
            digest: (place, size)
            for subject in subjects
            for digest, size, place in _places(subject)
            if self._wanted(place) and digest not in self._moved
        }
        changes = any(
            self._wanted(place) for subject in subjects for _, _, place in _places(subject)
        )
        if not changes and not self._rewrite:
            return
        if unmoved:
            await self._move(unmoved)
        table = self._relocated(disk)
        await self._leave(
            {pack for subject in subjects for pack in subject.table.packs}
            | {bytes.fromhex(pack) for pack in root.packs}
        )
        for layer in layers:
            await self._put_layer(layer)
        name, _ = await catalog.put_sealed("locations", table.encode(), lease.generation)
        if self._rewrite:
            await self._write_again(root, [layer.index for layer in manifest.layers])
        moved = replace(
            root,
            locations=name.hex(),
            packs=tuple(pack.hex() for pack in table.packs),
            packed_bytes=sum(table.stored_lengths),
        )
        await lease.commit(moved)
        self.report.images.append(root.image)

    async def _layer(self, diff_id: str, generation: int) -> _Subject | None:
        try:
            record = await self._catalog.find_layer(diff_id, generation)
            index = await self._catalog.layer_index(bytes.fromhex(record.index), generation)
            raw = await self._catalog.sealed(
                "locations", bytes.fromhex(record.locations), generation
            )
            return _Subject(index.chunks, LocationTable.decode(raw), record)
        except _BROKEN:
            return None  # the layer is converted again when it is wanted

    async def _leave(self, packs: set[bytes]) -> None:
        """Before records name other packs: where they are named now, for the generation's life.

        A builder may have read that already, and a collector may be reading it.
        """
        record = LeftRecord(tuple(sorted(pack.hex() for pack in packs))).encode()
        where = self._catalog.keys.left(chunk_digest(record), self._generation)
        await self._catalog.store.put(where, record)

    async def _put_layer(self, layer: _Subject) -> None:
        table = self._relocated(layer)
        if layer.layer is None:
            return
        name, _ = await self._catalog.put_sealed("locations", table.encode(), self._generation)
        packs = tuple(pack.hex() for pack in table.packs)
        record = replace(layer.layer, locations=name.hex(), packs=packs)
        await self._catalog.put_layer(record, self._generation)

    def _relocated(self, subject: _Subject) -> LocationTable:
        return LocationTable.build(
            subject.table.subject,
            [
                self._moved[digest] if self._wanted(place) else place
                for digest, _, place in _places(subject)
            ],
        )

    async def _write_again(self, root: RootRecord, indexes: Iterable[bytes]) -> None:
        """What keeps its name is sealed with the secret in use by being written."""
        catalog, generation = self._catalog, root.generation
        for index in dict.fromkeys(indexes):
            await catalog.put_sealed(
                "indexes", await catalog.sealed("indexes", index, generation), generation
            )
        manifest = bytes.fromhex(root.block_image)
        plaintext = await catalog.sealed("manifests", manifest, generation)
        await catalog.put_sealed("manifests", plaintext, generation)
        for blob in (root.image, root.config):
            await catalog.put_blob(blob, await catalog.blob(blob, generation), generation)

    # --- chunks

    async def _move(self, chunks: dict[bytes, tuple[Location, int]]) -> None:
        """Copies chunks, verified, into new packs; `_moved` has them once these are stored."""
        order = sorted(
            chunks, key=lambda digest: (chunks[digest][0].pack, chunks[digest][0].offset)
        )
        await asyncio.to_thread(self._scratch.mkdir, parents=True, exist_ok=True, mode=0o700)
        path = self._scratch / "pack"
        writer, file, held = await asyncio.to_thread(self._begin, path)
        try:
            for run in _runs([(digest, *chunks[digest]) for digest in order]):
                for digest, blocks, codec, key_id, stored in await self._read(run):
                    offset = writer.length
                    piece = writer.add(digest, stored, blocks=blocks, codec=codec, key_id=key_id)
                    await asyncio.to_thread(file.write, piece)
                    held[digest] = (offset, len(stored), codec, key_id)
                if writer.is_full():
                    await self._store(writer, file, path, held)
                    writer, file, held = await asyncio.to_thread(self._begin, path)
            if held:
                await self._store(writer, file, path, held)
        finally:
            file.close()

    def _begin(
        self, path: Path
    ) -> tuple[PackWriter, BinaryIO, dict[bytes, tuple[int, int, int, int]]]:
        writer = PackWriter(self._catalog.seals.pack_key)
        file = path.open("wb")
        file.write(writer.start())
        return writer, file, {}

    async def _store(
        self,
        writer: PackWriter,
        file: BinaryIO,
        path: Path,
        held: dict[bytes, tuple[int, int, int, int]],
    ) -> None:
        tail, digest = writer.finish()
        await asyncio.to_thread(file.write, tail)
        await asyncio.to_thread(file.close)
        name = pack_name(digest, self._generation)
        await self._catalog.store.put(self._catalog.keys.pack(name), path)
        self.report.packs += 1
        for chunk, (offset, length, codec, key_id) in held.items():
            self._moved[chunk] = Location(name, offset, length, codec, key_id)
            self.report.chunks += 1
            self.report.moved_bytes += length

    async def _read(
        self, run: list[tuple[bytes, Location, int]]
    ) -> list[tuple[bytes, int, int, int, bytes]]:
        """Verified chunks of one range, sealed with the secret in use."""
        first, last = run[0][1], run[-1][1]
        length = last.offset + last.stored_length - first.offset
        key = self._catalog.keys.pack(first.pack)
        body = await self._reader.read(key, first.offset, length, priority=Priority.FILL)
        return await asyncio.to_thread(self._resealed, run, body, first.offset)

    def _resealed(
        self, run: list[tuple[bytes, Location, int]], body: bytes, offset: int
    ) -> list[tuple[bytes, int, int, int, bytes]]:
        seals = self._catalog.seals
        wanted = [Wanted(place, size * BLOCK, digest, seals) for digest, place, size in run]
        found = []
        for (digest, place, size), answer in zip(
            run, decode_all(body, offset, wanted), strict=True
        ):
            if isinstance(answer, Corrupt):
                raise answer
            at = place.offset - offset
            stored, key_id = body[at : at + place.stored_length], place.key_id
            if key_id != seals.active and seals.pack_key is not None:
                encoded = bytes(seals.open_chunk(key_id, digest, stored))
                stored, key_id = seals.pack_key.seal_chunk(digest, encoded), seals.active
            found.append((digest, size, place.codec, key_id, stored))
        return found


def _places(subject: _Subject) -> Iterable[tuple[bytes, int, Location]]:
    """(digest, blocks, place) of every chunk of a subject, by ordinal."""
    if len(subject.table) != len(subject.chunks):
        raise Corrupt("a location table is of another subject")
    for ordinal, (digest, size) in enumerate(subject.chunks):
        yield digest, size, subject.table.locate(ordinal)


def _runs(chunks: list[tuple[bytes, Location, int]]) -> list[list[tuple[bytes, Location, int]]]:
    """Neighbours in one pack, in ranges of at most RUN_BYTES."""
    runs: list[list[tuple[bytes, Location, int]]] = []
    for chunk in chunks:
        place = chunk[1]
        if runs:
            first, last = runs[-1][0][1], runs[-1][-1][1]
            follows = place.pack == last.pack and place.offset == last.offset + last.stored_length
            if follows and place.offset + place.stored_length - first.offset <= RUN_BYTES:
                runs[-1].append(chunk)
                continue
        runs.append([chunk])
    return runs


async def sparse_packs(
    catalog: Catalog, tables: Iterable[LocationTable], share: float
) -> set[bytes]:
    """Packs of which images name less than this share of the stored bytes."""
    live: dict[bytes, dict[int, int]] = {}
    for table in tables:
        for place in map(table.locate, range(len(table))):
            live.setdefault(place.pack, {})[place.offset] = place.stored_length
    found = set()
    for pack, places in live.items():
        try:
            size = (await catalog.store.stat(catalog.keys.pack(pack))).size
        except NotFound:
            continue  # repair's to tell
        if sum(places.values()) < share * size:
            found.add(pack)
    return found


async def reseal_records(catalog: Catalog, key_id_of: Callable[[str], Any]) -> int:
    """Seals names, pins and what collections left with the secret in use; how many.

    Each is written as it was read a moment before; a name that is moved in that moment is moved
    back, so nobody should preload meanwhile.
    """
    keys, store, count = catalog.keys, catalog.store, 0
    for prefix in (keys.aliases, keys.pins, keys.collections, keys.quarantine, keys.scrub_position):
        for key in [stat.key async for stat in store.list(prefix)]:
            try:
                if await key_id_of(key) in (NO_KEY, catalog.seals.active):
                    continue
                await store.put(key, await store.get(key, limit=1 << 30))
                count += 1
            except _BROKEN:
                continue
    return count
