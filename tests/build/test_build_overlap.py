"""Conversion beside downloads: growing blobs, downloads that begin anew, workers that stay."""

import asyncio
import gzip
import hashlib
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from imagemaker.entries import Entry, write_tar
from kits.image import write_image

from imagecache.blockimage.manifest import Face
from imagecache.build.chunksink import LEAST_ROOM_BYTES, ChunkSink, FinishedPack
from imagecache.build.growing import GrowingBlob, open_blob
from imagecache.build.hashing import ThreadedHash
from imagecache.build.known import KnownChunks
from imagecache.build.pipeline import Builder, BuildSettings
from imagecache.build.progress import BuildResult
from imagecache.build.spool import Spool
from imagecache.build.workers import Worker
from imagecache.catalog import AliasName, Catalog
from imagecache.composition import open_store
from imagecache.errors import LimitExceeded, NotFound, Rejected, Unavailable
from imagecache.oci.platform import host_platform
from imagecache.oci.reference import parse_reference
from imagecache.oci.settings import RegistrySettings
from imagecache.oci.source import open_source


def test_reader_follows_a_growing_blob_through_its_rename(tmp_path: Path) -> None:
    body = os.urandom(3_000_000)
    target = tmp_path / "blob"
    partial = tmp_path / "blob.partial"
    partial.write_bytes(body[:1000])

    def grow() -> None:
        with partial.open("ab") as file:
            for at in range(1000, len(body), 500_000):
                file.write(body[at : at + 500_000])
                file.flush()
                time.sleep(0.01)
        partial.rename(target)

    thread = threading.Thread(target=grow)
    thread.start()
    with open_blob(target, len(body)) as blob:
        read = b"".join(iter(lambda: blob.read(70_000), b""))
    thread.join()
    assert read == body
    with open_blob(target, len(body)) as blob:  # complete: the final name alone is there
        assert blob.read() == body


def test_reader_stops_at_the_blob_s_size_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"123456")
    with open_blob(tmp_path / "blob", 4) as blob:
        assert blob.read() == b"1234"
    with pytest.raises(NotFound, match="absent"):
        GrowingBlob(tmp_path / "absent", 4)


def test_threaded_hash_is_the_hash() -> None:
    pieces = [os.urandom(n * 1000) for n in range(40)]
    digest = ThreadedHash("sha256")
    for piece in pieces:
        digest.update(piece)
    assert digest.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()


class Replacing:
    """A source whose first bytes of every blob are wrong until the download begins anew."""

    def __init__(self, inner: Any, *, fails: bool = False) -> None:
        self._inner = inner
        self._fails = fails

    async def resolve(self, platform: Any) -> Any:
        return await self._inner.resolve(platform)

    async def fetch_blob(self, descriptor: Any, target: Path, progress: Any) -> None:
        partial = target.with_name(target.name + ".partial")
        wrong = gzip.compress(write_tar([Entry("wrong", content=os.urandom(400_000))]))
        partial.write_bytes(wrong)
        progress(len(wrong))
        await asyncio.sleep(0.5)  # the worker is at it by now
        if self._fails:
            raise Unavailable("the registry is gone")
        partial.write_bytes(b"")
        progress(0)
        partial.unlink()
        await self._inner.fetch_blob(descriptor, target, progress)

    async def close(self) -> None:
        await self._inner.close()


def build(root: Path, reference: str, *, replacing: bool, fails: bool = False) -> BuildResult:
    async def run() -> BuildResult:
        opened = open_store((root / "store").as_uri())
        source: Any = open_source(parse_reference(reference), RegistrySettings())
        if replacing:
            source = Replacing(source, fails=fails)
        builder = Builder(Catalog(opened.store, "default"), Spool(root / "spool"), BuildSettings())
        try:
            return await builder.build(
                source,
                host_platform(),
                face=Face.EROFS,
                options="{}",
                alias=AliasName("oci:image", "latest", reference),
                report=lambda _: None,
            )
        finally:
            await source.close()
            await opened.close()

    return asyncio.run(run())


def test_download_that_begins_anew_is_converted_anew(tmp_path: Path) -> None:
    """What a worker read of bytes that were replaced reaches no index."""
    layers = [[Entry("a", content=os.urandom(500_000))], [Entry("b", content=b"b" * 9000)]]
    reference = write_image(tmp_path / "image", layers)
    wanted = build(tmp_path / "one", reference, replacing=False)
    found = build(tmp_path / "two", reference, replacing=True)
    assert found.block_image == wanted.block_image


def test_download_that_fails_ends_its_conversion(tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [[Entry("a", content=os.urandom(500_000))]])
    with pytest.raises(Unavailable, match="gone"):
        build(tmp_path / "one", reference, replacing=True, fails=True)


def test_worker_stays_for_the_next_job_and_goes_with_a_failed_one(tmp_path: Path) -> None:
    tar = write_tar([Entry("a", content=b"a" * 5000)])
    (tmp_path / "blob").write_bytes(tar)

    def job(name: str, diff_id: str) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        return {
            "kind": "layer",
            "blob": str(tmp_path / "blob"),
            "blob_bytes": len(tar),
            "diff_id": diff_id,
            "directory": str(tmp_path / name),
            "known": [],
            "references": [],
            "limits": {},
            "level": 1,
            "generation": 1,
        }

    right = "sha256:" + hashlib.sha256(tar).hexdigest()

    async def run() -> list[int]:
        worker = Worker()
        pids = []

        async def once(name: str, diff_id: str, seconds: float = 60) -> None:
            async for _ in worker.run(job(name, diff_id), deadline_seconds=seconds):
                pids.append(worker.pid)

        try:
            await once("one", right)
            await once("two", right)
            with pytest.raises(Rejected, match="diff id"):
                await once("three", "sha256:" + "0" * 64)
            await once("four", right)
            with pytest.raises(LimitExceeded, match="longer than"):
                await once("five", right, seconds=0)
            await once("six", right)
        finally:
            await worker.close()
        return pids

    pids = asyncio.run(run())
    first = pids[0]
    assert pids.count(first) >= 4  # a pack and an end, twice
    assert len(set(pids)) == 3


def test_packs_wait_for_uploads_while_the_disk_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow store does not fill the disk with packs: the next one waits for the last."""
    (tmp_path / "before").mkdir()
    (tmp_path / "now").mkdir()
    waiting = tmp_path / "before" / "pack-00000"
    waiting.write_bytes(b"")
    looks = 0

    def usage(_: object) -> SimpleNamespace:
        nonlocal looks
        looks += 1
        if looks == 3:
            waiting.unlink()  # stored by now
        return SimpleNamespace(free=LEAST_ROOM_BYTES - 1)

    monkeypatch.setattr("imagecache.build.chunksink.shutil.disk_usage", usage)
    done: list[FinishedPack] = []
    sink = ChunkSink(tmp_path / "now", KnownChunks(), done.append)
    sink.submit(bytes(range(256)) * 16)
    sink.finish()
    assert looks == 3
    assert [pack.path.parent.name for pack in done] == ["now"]


async def test_a_worker_is_gone_when_its_end_was_cancelled() -> None:
    """A group that aborts cancels whoever waits for the worker's end: it was left to itself."""
    worker = Worker()
    await worker.start()
    pid = worker.pid
    closing = asyncio.create_task(worker.close())
    for _ in range(2):
        await asyncio.sleep(0)
        closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert not Path(f"/proc/{pid}").exists()
