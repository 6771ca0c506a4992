"""A never preloaded image is served from the builder's spool while it is being stored."""

import asyncio
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbd
import pytest
from imagemaker.entries import Entry, directory
from kits.image import write_image
from testbed.processes import Stage

from imagecache.composition import ImageRequest, opened_catalog
from imagecache.daemon.serve import serve
from imagecache.daemon.service import ExportRequest, Service
from imagecache.errors import Denied
from imagecache.profile.prepare import load_image
from imagecache.sections import EncryptionSection
from imagecache.settings import CacheSection, Settings
from preload.client import connect
from preload.jobs import Job, JobState

SECONDS = 100


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


FILES = {
    b"etc/one": content(1, 9_000),
    b"large": content(2, 900_000),
    b"app/two": content(3, 70_000),
}


@pytest.fixture
def fresh(tmp_path: Path) -> str:
    """An image of three layers that no store has."""
    layers = [
        [directory("etc"), Entry("etc/one", content=FILES[b"etc/one"])],
        [Entry("large", content=FILES[b"large"])],
        [directory("app"), Entry("app/two", content=FILES[b"app/two"])],
    ]
    return write_image(tmp_path / "fresh", layers)


class HeldStore:
    """A store whose puts of packs, objects and roots wait until the test lets them, or fail."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.may_go = asyncio.Event()
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def put(self, key: str, body: Any, *, only_if_absent: bool = False) -> bool:
        if "/packs/" in key or "/indexes/" in key or "/manifests/" in key or "/roots/" in key:
            await self.may_go.wait()
            if self.fails:
                raise Denied("scripted: the store takes nothing")
        written: bool = await self.inner.put(key, body, only_if_absent=only_if_absent)
        return written


async def begun(service: Service, image: str) -> tuple[HeldStore, Job]:
    """A build whose store takes nothing yet, at the moment when its image can be exported."""
    held = HeldStore(service.catalog.store)
    service.catalog.store = held
    (job,) = await service.jobs.submit([ImageRequest.parse(image, None, "erofs")])
    async with asyncio.timeout(SECONDS):
        while not job.readable and not job.ended:
            await job.watch(job.version, 5)
    assert job.readable, job.error
    return held, job


async def ended(job: Job) -> Job:
    async with asyncio.timeout(SECONDS):
        while not job.ended:
            await job.watch(job.version, 5)
    return job


async def read(uri: str, offset: int, length: int) -> bytes:
    def work() -> bytes:
        client = nbd.NBD()
        client.connect_uri(uri)
        try:
            return bytes(client.pread(length, offset))
        finally:
            client.shutdown()

    return await asyncio.wait_for(asyncio.to_thread(work), SECONDS)


async def exported(service: Service, image: str) -> tuple[Any, dict[bytes, Any]]:
    export = await service.export(ExportRequest(ImageRequest.parse(image, None, "erofs")))
    loaded = await load_image(service.catalog, export.record, service.starts.sealed)
    return export, {span.path: span for span in loaded.view.files()}


async def content_of(export: Any, span: Any) -> bytes:
    return await read(export.uri, span.offset, span.size)


async def roots(service: Service) -> int:
    return len([root async for root in service.catalog.roots()])


async def test_image_is_read_from_the_spool_before_it_is_stored(
    service: Service, fresh: str
) -> None:
    held, job = await begun(service, fresh)
    export, spans = await exported(service, fresh)
    assert spans.keys() == FILES.keys()
    assert await content_of(export, spans[b"large"]) == FILES[b"large"]
    assert await content_of(export, spans[b"etc/one"]) == FILES[b"etc/one"]
    assert await roots(service) == 0 and job.state is JobState.RUNNING
    assert not [x async for x in held.inner.list(service.catalog.keys.all_packs)]
    assert export.as_json()["stored"] is False
    held.may_go.set()
    assert (await ended(job)).state is JobState.DONE, job.error
    assert export.as_json()["stored"] is True
    assert len(service.packs) == 0 and await roots(service) == 1
    # What nobody has read yet comes from the store now, through the same device.
    assert await content_of(export, spans[b"app/two"]) == FILES[b"app/two"]


async def test_sealed_realm_is_read_from_the_spool_too(
    where: Settings, fresh: str, tmp_path: Path
) -> None:
    document = tmp_path / "secrets"
    document.write_text(f"names:{'1f' * 32}\n1:{'2e' * 32}\n")
    document.chmod(0o600)
    sealed = replace(where, encryption=EncryptionSection(secrets=f"file:{document}"))
    service = await Service.open(sealed)
    try:
        held, job = await begun(service, fresh)
        export, spans = await exported(service, fresh)
        assert await content_of(export, spans[b"large"]) == FILES[b"large"]
        held.may_go.set()
        assert (await ended(job)).state is JobState.DONE, job.error
        assert await content_of(export, spans[b"app/two"]) == FILES[b"app/two"]
    finally:
        await service.close()


async def test_export_outlives_a_build_that_fails(service: Service, fresh: str) -> None:
    held, job = await begun(service, fresh)
    export, spans = await exported(service, fresh)
    assert await content_of(export, spans[b"etc/one"]) == FILES[b"etc/one"]
    held.fails = True
    held.may_go.set()
    assert (await ended(job)).state is JobState.FAILED
    assert await content_of(export, spans[b"large"]) == FILES[b"large"]
    told = export.as_json()
    assert "takes nothing" in told["failure"] and told["state"] == "serving"
    assert await roots(service) == 0
    # The next attempt that succeeds adopts it.
    held.fails = False
    (again,) = await service.jobs.submit([job.request])
    assert (await ended(again)).state is JobState.DONE, again.error
    assert export.stored and export.failure is None
    assert await content_of(export, spans[b"app/two"]) == FILES[b"app/two"]
    assert len(service.packs) == 0


async def test_spool_is_given_up_with_the_last_export(service: Service, fresh: str) -> None:
    held, job = await begun(service, fresh)
    export, _ = await exported(service, fresh)
    held.fails = True
    held.may_go.set()
    await ended(job)
    assert len(service.packs) > 0
    await service.unexport(export.record.name, force=True)
    assert len(service.packs) == 0


async def test_client_exports_ahead_and_waits_for_the_store_at_the_end(
    where: Settings, fresh: str
) -> None:
    """What `export`, `run` and `mount` do; before `run` ends its own daemon, it waits."""
    announced: list[Service] = []
    task = asyncio.create_task(serve(where, announced.append))
    try:
        async with asyncio.timeout(SECONDS):
            while not announced:
                await asyncio.sleep(0.01)
            held = HeldStore(announced[0].catalog.store)
            announced[0].catalog.store = held
            async with connect(where, start=False) as client:
                handle = await client.export(fresh)
                assert handle.fields["stored"] is False
                assert len(await read(handle.uri, 0, 4096)) == 4096
                settling = asyncio.create_task(client.settle())
                await asyncio.sleep(0.2)
                assert not settling.done()
                held.may_go.set()
                await settling
                (export,) = await client.exports()
                assert export["stored"] is True
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


SERVE_HELD = """
import asyncio, json, sys
from pathlib import Path
from imagecache.composition import ImageRequest
from imagecache.daemon.service import ExportRequest, Service
from imagecache.settings import CacheSection, Settings

class Held:
    def __init__(self, inner):
        self.inner = inner
    def __getattr__(self, name):
        return getattr(self.inner, name)
    async def put(self, key, body, *, only_if_absent=False):
        if "/packs/" in key or "/roots/" in key:
            await asyncio.sleep(600)
        return await self.inner.put(key, body, only_if_absent=only_if_absent)

async def run():
    where = Settings(
        state_dir=Path(sys.argv[1]),
        store_url=Path(sys.argv[1], "store").as_uri(),
        cache=CacheSection(budget_bytes=64 << 20, fill="none"),
    )
    service = await Service.open(where)
    service.catalog.store = Held(service.catalog.store)
    request = ImageRequest.parse(sys.argv[2], None, "erofs")
    (job,) = await service.jobs.submit([request])
    while not job.readable:
        await job.watch(job.version, 5)
    export = await service.export(ExportRequest(request))
    print(json.dumps({"uri": export.uri}), flush=True)
    await asyncio.sleep(600)

asyncio.run(run())
"""


async def test_kill_before_the_upload_ends_leaves_nothing_half_made(
    tmp_path: Path, fresh: str
) -> None:
    """The daemon is killed while a guest reads an image that is not stored yet."""
    state = tmp_path / "killed"
    with Stage() as stage:
        process = stage.start([sys.executable, "-c", SERVE_HELD, str(state), fresh])
        await asyncio.to_thread(process.wait_until, lambda: b"uri" in process.log.read_bytes(), 100)
        uri = json.loads(process.log.read_bytes().splitlines()[-1])["uri"]
        assert len(await read(uri, 0, 4096)) == 4096
        process.kill()
    where = Settings(
        state_dir=state,
        store_url=(state / "store").as_uri(),
        cache=CacheSection(budget_bytes=64 << 20, fill="none"),
    )
    async with opened_catalog(where) as (_, catalog):
        assert not [root async for root in catalog.roots()]
    service = await Service.open(where)
    try:
        assert service.exports() == [] and len(service.packs) == 0
        assert not (state / "spool" / "unstored").exists()
        (job,) = service.jobs.jobs()  # it was killed while it ran, so it is done again
        assert (await ended(job)).state is JobState.DONE, job.error
        export, spans = await exported(service, fresh)
        for path, wanted in FILES.items():
            assert await content_of(export, spans[path]) == wanted
    finally:
        await service.close()
