"""What a preload would do: sizes, what is missing, how long. `plan` is pure; `look` asks around."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from imagecache.blockimage.keys import ImageKey
from imagecache.build.spool import Spool
from imagecache.catalog import Catalog
from imagecache.composition import ImageRequest, registry_settings
from imagecache.errors import NotFound
from imagecache.facechoice import FaceChoice
from imagecache.oci.platform import host_platform, parse_platform
from imagecache.oci.reference import parse_reference
from imagecache.oci.source import ResolvedImage, open_source
from imagecache.settings import PricesSection, Settings

PACK_BYTES = 16 << 20
OBJECTS_PER_LAYER = 4
STORED_PER_COMPRESSED = 1.1
"""Where no preload has told better: zstd chunks of 256 KiB against a layer's gzip."""


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer: its compressed size, what of it is on this disk, whether the store has it."""

    compressed_bytes: int
    here_bytes: int
    stored: bool


@dataclass(frozen=True, slots=True)
class Experience:
    """What earlier preloads of this host told; None where none did."""

    stored_per_downloaded: float | None = None
    bytes_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One image; sizes in bytes, time in seconds, None where nothing is known to estimate by."""

    image: str
    digest: str
    present: bool
    layers: int
    missing_layers: int
    total_bytes: int
    missing_bytes: int
    download_bytes: int
    store_bytes_estimate: int
    seconds_estimate: float | None
    month_cost_estimate: float | None = None  # of what is stored, by [prices]
    once_cost_estimate: float | None = None  # of writing it

    def as_json(self) -> dict[str, Any]:
        """The object that `preload --dry-run --json` prints."""
        return asdict(self)


def experience(results: Iterable[Mapping[str, Any]]) -> Experience:
    """Of the results of finished preloads that downloaded something."""
    told = [result for result in results if result.get("downloaded_bytes")]
    downloaded = sum(result["downloaded_bytes"] for result in told)
    seconds = sum(result["seconds"] for result in told)
    if not downloaded or not seconds:
        return Experience()
    stored = sum(result["stored_bytes"] for result in told)
    return Experience(round(stored / downloaded, 3), round(downloaded / seconds, 1))


def plan(
    image: str, digest: str, layers: list[LayerFacts], *, present: bool, known: Experience
) -> Plan:
    """What a preload of these layers would do."""
    missing = [] if present else [layer for layer in layers if not layer.stored]
    missing_bytes = sum(layer.compressed_bytes for layer in missing)
    ratio = known.stored_per_downloaded or STORED_PER_COMPRESSED
    seconds = None
    if known.bytes_per_second:
        seconds = round(missing_bytes / known.bytes_per_second, 1)
    return Plan(
        image=image,
        digest=digest,
        present=present,
        layers=len(layers),
        missing_layers=len(missing),
        total_bytes=sum(layer.compressed_bytes for layer in layers),
        missing_bytes=missing_bytes,
        download_bytes=sum(max(0, x.compressed_bytes - x.here_bytes) for x in missing),
        store_bytes_estimate=int(missing_bytes * ratio),
        seconds_estimate=0.0 if not missing else seconds,
    )


def with_cost(found: Plan, prices: PricesSection) -> Plan:
    """The plan with what the store would charge; unchanged where no price is set."""
    if not prices.gib_month and not prices.thousand_writes:
        return found
    objects = 0
    if found.missing_layers or not found.present:
        # Packs, and per layer index, table and record; the image's own are as many.
        packs = -(-found.store_bytes_estimate // PACK_BYTES)
        objects = packs + OBJECTS_PER_LAYER * (found.missing_layers + 1)
    return replace(
        found,
        month_cost_estimate=round(found.store_bytes_estimate / (1 << 30) * prices.gib_month, 6),
        once_cost_estimate=round(objects / 1000 * prices.thousand_writes, 6),
    )


async def look(
    settings: Settings, catalog: Catalog, request: ImageRequest, known: Experience
) -> Plan:
    """The plan of one request: asks the registry and the store, and changes neither."""
    platform = parse_platform(request.platform) if request.platform else host_platform()
    source = open_source(parse_reference(request.reference), registry_settings(settings))
    try:
        image = await source.resolve(platform)
    finally:
        await source.close()
    choice = FaceChoice.parse(request.face)
    present = True
    try:
        await catalog.find_root(ImageKey(str(image.digest), choice.face, choice.options))
    except NotFound:
        present = False
    layers = await _layers(Spool(settings.state_dir / "spool"), catalog, image)
    found = plan(request.reference, str(image.digest), layers, present=present, known=known)
    return with_cost(found, settings.prices)


async def _layers(spool: Spool, catalog: Catalog, image: ResolvedImage) -> list[LayerFacts]:
    active = await catalog.readable_generations()
    facts = []
    for layer in dict.fromkeys(image.layers):
        stored = False
        if active:
            try:
                await catalog.find_layer(str(layer.diff_id), active[0])
                stored = True
            except NotFound:
                pass
        blob = spool.blob(str(layer.descriptor.digest))
        here = await asyncio.to_thread(_size, blob)
        facts.append(LayerFacts(layer.descriptor.size, here, stored))
    return facts


def _size(blob: Path) -> int:
    for path in (blob, blob.with_name(blob.name + ".partial")):
        try:
            return path.stat().st_size
        except OSError:
            continue
    return 0
