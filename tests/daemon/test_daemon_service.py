"""The daemon's exports: who sees them, what they answer, what outlives what."""

import asyncio
import dataclasses
import shutil
from pathlib import Path

import nbd
import pytest

from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.manifest import Face, canonical_options
from imagecache.composition import ImageRequest
from imagecache.daemon.service import ExportRequest, Service
from imagecache.errors import Busy, NotFound, UsageError
from imagecache.flatten.filetable import FileTable
from imagecache.flatten.limits import Limits
from imagecache.imageview import ImageView
from imagecache.settings import Settings


def request(image: str, **rest: str) -> ExportRequest:
    return ExportRequest(ImageRequest.parse(image, None, "erofs"), **rest)


async def read(uri: str, offset: int, length: int) -> bytes:
    def work() -> bytes:
        client = nbd.NBD()
        client.connect_uri(uri)
        try:
            return bytes(client.pread(length, offset))
        finally:
            client.shutdown()

    return await asyncio.to_thread(work)


async def refused(uri: str) -> bool:
    def work() -> bool:
        client = nbd.NBD()
        try:
            client.connect_uri(uri)
        except nbd.Error:
            return True
        client.shutdown()
        return False

    return await asyncio.to_thread(work)


async def view_of(service: Service, image: str) -> ImageView:
    export = await service.export(request(image))
    key = ImageKey(export.record.image, Face.EROFS, canonical_options({}))
    root = await service.catalog.find_root(key)
    manifest = await service.catalog.block_manifest(root)
    tables = [
        FileTable.decode(
            (await service.catalog.layer_index(x.index, root.generation)).file_table, Limits()
        )
        for x in manifest.layers
    ]
    return ImageView(manifest, tables)


async def test_bytes_on_the_wire_are_the_files_of_the_image(service: Service, built: str) -> None:
    view = await view_of(service, built)
    (export,) = service.exports()
    wanted = {
        b"etc/hello": b"hello again\n",
        b"large": bytes(range(256)) * 4096 + bytes(600_000) + b"end",
        b"small": b"s" * 5000,
    }
    spans = {span.path: span for span in view.files()}
    assert spans.keys() == wanted.keys()
    for path, content in wanted.items():
        span = spans[path]
        assert await read(export.uri, span.offset, span.size) == content
        assert view.path_at(span.offset + span.size - 1) == (path, span.size - 1)
        assert view.resolve(b"/" + path)[0] == path
    assert view.path_at(0) is None
    chunks = view.chunks_of(spans[b"large"])
    assert len(chunks) < (1 << 20) // (256 << 10) + 3  # the hole in the middle costs no chunk


async def test_same_export_twice_is_one_and_another_image_is_refused(
    service: Service, built: str
) -> None:
    """I5: create the same export twice; the same name for something else is a conflict."""
    first = await service.export(request(built))
    assert await service.export(request(built)) is first
    with pytest.raises(Busy):
        await service.export(request(built, name=first.record.name, socket="/tmp/elsewhere.sock"))
    with pytest.raises(UsageError):
        await service.export(request(built, name="../x"))
    with pytest.raises(NotFound):
        await service.export(request("oci:/nowhere:latest"))


async def test_export_alone_on_its_socket_is_invisible_elsewhere(
    service: Service, built: str, tmp_path: Path
) -> None:
    """E26: a VM cannot name another's disk; hidden and absent names look the same."""
    shared = await service.export(request(built))
    alone = await service.export(request(built, socket=str(tmp_path / "a.sock")))
    shared_socket = service.settings.nbd_socket
    assert await read(alone.uri, 0, 4096) == await read(shared.uri, 0, 4096)
    assert await refused(f"nbd+unix:///{alone.record.name}?socket={shared_socket}")
    assert await refused(f"nbd+unix:///{shared.record.name}?socket={tmp_path / 'a.sock'}")
    assert await refused(f"nbd+unix:///absent?socket={shared_socket}")


async def test_attached_export_is_not_ended_unless_forced(service: Service, built: str) -> None:
    """I6, F35: delete of an attached export is a conflict, forced it ends the client."""
    export = await service.export(request(built))
    client = nbd.NBD()
    await asyncio.to_thread(client.connect_uri, export.uri)
    for _ in range(100):
        if export.clients:
            break
        await asyncio.sleep(0.01)
    with pytest.raises(Busy, match="1 attached"):
        await service.unexport(export.record.name, force=False)
    await service.unexport(export.record.name, force=True)
    with pytest.raises(nbd.Error):
        await asyncio.to_thread(client.pread, 4096, 0)
    with pytest.raises(NotFound):
        await service.unexport(export.record.name, force=False)


async def test_exports_are_there_again_without_their_store(where: Settings, built: str) -> None:
    """Exports persist over a restart; what the host holds is served with the store gone."""
    service = await Service.open(where)
    name = (await service.export(request(built))).record.name
    expected = await read(service.exports()[0].uri, 0, 65536)
    await service.close()
    shutil.rmtree(where.store_url.removeprefix("file://"))
    again = await Service.open(where)
    try:
        (export,) = again.exports()
        assert (export.record.name, export.failure) == (name, None)
        assert await read(export.uri, 0, 65536) == expected
    finally:
        await again.close()


async def test_second_daemon_on_a_state_directory_is_refused(
    service: Service, where: Settings
) -> None:
    """H5: two daemons on one directory; the second is told the first one's pid."""
    with pytest.raises(Busy, match=r"\d+"):
        await Service.open(where)


async def test_damaged_export_table_is_set_aside(where: Settings, built: str) -> None:
    """H6: a table that is no database costs the exports, not the daemon."""
    where.state_dir.mkdir(parents=True, exist_ok=True)
    (where.state_dir / "exports.db").write_bytes(b"not a database at all" * 100)
    service = await Service.open(where)
    assert service.exports() == []
    await service.export(request(built))
    await service.close()
    assert (where.state_dir / "exports.damaged").exists()


async def test_cold_read_after_the_deadline_is_an_error_and_the_next_one_tries_again(
    where: Settings, built: str, tmp_path: Path
) -> None:
    """F30: a dead origin is EIO for that request; once it is back, the next read succeeds."""
    patient = dataclasses.replace(where, cache=dataclasses.replace(where.cache, stall_seconds=0.5))
    service = await Service.open(patient)
    try:
        view = await view_of(service, built)
        (export,) = service.exports()
        span = next(span for span in view.files() if span.path == b"small")
        store = Path(where.store_url.removeprefix("file://"))
        store.rename(tmp_path / "away")
        with pytest.raises(nbd.Error, match="Input/output error"):
            await read(export.uri, span.offset, span.size)
        # Not renamed: a lease may have been written meanwhile, which makes the directory.
        shutil.copytree(tmp_path / "away", store, dirs_exist_ok=True)
        assert await read(export.uri, span.offset, span.size) == b"s" * 5000
    finally:
        await service.close()


async def test_the_api_answers_while_store_is_gone_and_a_build_hangs(
    daemon: Settings, built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I16: no answer about this host waits for the store, a registry or a build."""
    from imagecache.daemon import service as module
    from preload.client import connect

    never = asyncio.Event()

    async def hang(*_: object, **__: object) -> None:
        await never.wait()

    monkeypatch.setattr(module, "build_image", hang)
    async with connect(daemon, start=False) as client:
        handle = await client.export(built)
        shutil.rmtree(daemon.store_url.removeprefix("file://"))
        (job,) = await client.submit([ImageRequest.parse("oci:/x:y", None, "erofs")])
        for path in ("/healthz", "/readyz", "/metrics", "/v1/status", "/v1/exports"):
            assert await client.call("GET", path)
        assert await client.call("GET", f"/v1/exports/{handle.name}")
        running = await client.call("GET", f"/v1/preloads/{job['id']}", wait=5, since=0)
        assert running["state"] == "running"
        assert (await client.cancel(job["id"]))["state"] == "cancelled"
