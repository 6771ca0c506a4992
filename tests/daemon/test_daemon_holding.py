"""What a daemon exports is not collected, and an export follows its image when that moves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from imagecache.catalog import Catalog
from imagecache.collect.plan import Policy
from imagecache.collect.run import Collector, Wishes
from imagecache.composition import ImageRequest
from imagecache.daemon.service import ExportRequest, Service
from imagecache.settings import Settings

NOW = Wishes(Policy(min_age=0, grace=0), delete_many=True)


async def leased(service: Service, wanted: int) -> None:
    prefix = service.catalog.keys.reader_leases
    while len([stat async for stat in service.opened.store.list(prefix)]) != wanted:
        await asyncio.sleep(0.01)


async def litter(service: Service) -> None:
    """Something to collect, so that generations move."""
    key = f"{service.catalog.keys.packs(1)}{'0' * 64}"
    await service.opened.store.put(key, b"left by a killed build")


async def collect(catalog: Catalog) -> None:
    for _ in range(8):
        await Collector(catalog, NOW).run()


async def test_exported_image_without_a_name_stays_and_is_followed(
    service: Service, built: str, where: Settings
) -> None:
    """A lease holds what is exported; it is renewed onto the newer generation, and ends."""
    request = ExportRequest(ImageRequest.parse(built, None, "erofs"))
    export = await service.export(request)
    await leased(service, 1)
    for alias in await service.catalog.aliases():
        await service.catalog.drop_alias(alias)
    await litter(service)
    await collect(service.catalog)
    assert export.record.generation == 1
    service.holding.changed()
    while export.record.generation == 1:
        await asyncio.sleep(0.01)
    assert [root.image async for root in service.catalog.roots()] == [export.record.image]
    assert export.device is not None
    for piece in await export.device.read(0, 1 << 20):
        assert piece is not None
    await service.unexport(export.record.name, force=False)
    await leased(service, 0)
    await collect(service.catalog)
    assert not [root async for root in service.catalog.roots()]


async def test_restored_export_finds_what_moved_while_it_was_away(
    where: Settings, built: str
) -> None:
    """A daemon that was down while its image was copied on serves it again."""
    service = await Service.open(where)
    request = ExportRequest(ImageRequest.parse(built, None, "erofs"))
    name = (await service.export(request)).record.name
    await litter(service)
    await service.close()
    there = await Service.open(Settings(state_dir=Path(f"{where.state_dir}-other"),
                                        store_url=where.store_url))  # fmt: skip
    await collect(there.catalog)
    await there.close()
    for path in (where.state_dir / "objects").iterdir():
        path.unlink()
    again = await Service.open(where)
    (export,) = again.exports()
    assert (export.record.name, export.failure) == (name, None)
    assert export.record.generation > 1
    await again.close()


@pytest.mark.parametrize("tries", [3])
async def test_lease_ends_with_the_daemon(where: Settings, built: str, tries: int) -> None:
    """A daemon that ends leaves no lease behind."""
    for _ in range(tries):
        service = await Service.open(where)
        await service.export(ExportRequest(ImageRequest.parse(built, None, "erofs")))
        await leased(service, 1)
        await service.close()
    service = await Service.open(where)
    await leased(service, 1)
    await service.close()
    service = await Service.open(where)
    await service.unexport(service.exports()[0].record.name, force=True)
    await leased(service, 0)
    await service.close()
