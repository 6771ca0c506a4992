"""A small image in a store of its own, and a service over it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from imagemaker.entries import Entry, directory, whiteout
from kits.image import write_image

from imagecache.composition import ImageRequest, build_image, opened_catalog
from imagecache.daemon.serve import serve
from imagecache.daemon.service import Service
from imagecache.settings import CacheSection, Settings


@pytest.fixture
def where(tmp_path: Path) -> Settings:
    return Settings(
        state_dir=tmp_path / "state",
        store_url=(tmp_path / "store").as_uri(),
        cache=CacheSection(budget_bytes=64 << 20, fill="none"),
    )


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An image of three layers: small files, a large one, a hole, a replaced file."""
    return write_image(
        tmp_path / "image",
        [
            [
                directory("etc"),
                Entry("etc/hello", content=b"hello\n"),
                Entry("etc/gone", content=b"gone\n"),
                Entry("large", content=bytes(range(256)) * 4096 + bytes(600_000) + b"end"),
            ],
            [Entry("etc/hello", content=b"hello again\n"), whiteout("etc/gone")],
            [Entry("small", content=b"s" * 5000)],
        ],
    )


@pytest.fixture
async def built(where: Settings, image: str) -> str:
    async with opened_catalog(where) as (_, catalog):
        await build_image(where, catalog, ImageRequest.parse(image, None, "erofs"), lambda _: None)
    return image


@pytest.fixture
async def service(where: Settings) -> AsyncIterator[Service]:
    service = await Service.open(where)
    yield service
    await service.close()


@pytest.fixture
async def daemon(where: Settings) -> AsyncIterator[Settings]:
    """A daemon with all its sockets, in this process."""
    ready = asyncio.Event()
    task = asyncio.create_task(serve(where, lambda _: ready.set()))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, return_when="FIRST_COMPLETED")
    waiting.cancel()
    assert ready.is_set(), task
    yield where
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
