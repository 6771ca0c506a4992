"""The control API over its real socket: bodies, statuses, problem documents, jobs."""

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from imagecache.daemon.problems import HTTP_STATUSES, status_of
from imagecache.errors import CubecacheError, UsageError
from imagecache.settings import Settings
from preload.client import connect


@pytest.fixture
async def http(daemon: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.UnixConnector(path=str(daemon.control_socket))
    async with aiohttp.ClientSession("http://cubecache", connector=connector) as session:
        yield session


async def post(http: aiohttp.ClientSession, path: str, raw: bytes, kind: str) -> tuple[int, Any]:
    async with http.post(path, data=io.BytesIO(raw), headers={"Content-Type": kind}) as answer:
        return answer.status, json.loads(await answer.read())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"image": "a", "image": "b"}',
        b'{"image": NaN}',
        b"{}",
        b'{"image": 3}',
        b'{"image": true}',
        b'{"image": "x", "extra": 1}',
        b'{"image": "UPPER/x"}',
        b'{"image": "x", "fs": "ntfs"}',
    ],
)
async def test_bad_bodies_are_400_with_a_problem_document(
    http: aiohttp.ClientSession, raw: bytes
) -> None:
    """I1, I2, I4: not JSON, wrong shape, duplicate keys, unknown or mistyped fields."""
    status, problem = await post(http, "/v1/exports", raw, "application/json")
    assert (status, problem["kind"]) == (400, "UsageError"), problem
    assert problem["detail"]


async def test_wrong_content_type_and_huge_bodies_are_refused(http: aiohttp.ClientSession) -> None:
    """I1: wrong content type, a body over the cap."""
    assert (await post(http, "/v1/exports", b"image=x", "text/plain"))[0] == 415
    huge = b'{"image": "' + b"x" * (2 << 20) + b'"}'
    assert (await post(http, "/v1/exports", huge, "application/json"))[0] == 413


@pytest.mark.parametrize(
    "path", ["/v1/%2e%2e%2fetc", "/v1/exports/%00", "/v1/nothing", "/" + "a" * 8000]
)
async def test_odd_paths_are_not_found(http: aiohttp.ClientSession, path: str) -> None:
    """I3: path tricks reach no route."""
    async with http.get(path) as answer:
        assert answer.status in (400, 404, 405), answer.status


async def test_health_metrics_and_status(http: aiohttp.ClientSession) -> None:
    async with http.get("/healthz") as answer:
        assert answer.status == 200
    async with http.get("/readyz") as answer:
        assert (await answer.json())["status"] == "ready"
    async with http.get("/metrics") as answer:
        text = await answer.text()
    assert "cubecache_nbd_hits_total" in text
    assert "cubecache_arena_budget_bytes" in text


async def test_client_preloads_then_exports(daemon: Settings, image: str) -> None:
    """An image nobody has is preloaded by the daemon, watched, and exported."""
    seen: list[str] = []
    async with connect(daemon, start=False) as client:
        handle = await client.export(image, on_progress=lambda job: seen.append(job["state"]))
        assert handle.uri.startswith("nbd+unix:///")
        assert [item["name"] for item in await client.exports()] == [handle.name]
        await client.unexport(handle.name)
        assert await client.exports() == []
    assert seen


async def test_failed_preload_tells_its_kind_and_equal_ones_are_one_job(
    http: aiohttp.ClientSession,
) -> None:
    """I7, I9: equal requests share a job; a failed job ends with a typed error."""
    body = json.dumps({"images": ["oci:/nowhere:latest"]}).encode()
    _, first = await post(http, "/v1/preloads", body, "application/json")
    _, second = await post(http, "/v1/preloads", body, "application/json")
    (first,), (second,) = first["preloads"], second["preloads"]
    job = first
    while job["state"] in ("queued", "running"):
        query = {"wait": "5", "since": str(job["version"])}
        async with http.get(f"/v1/preloads/{first['id']}", params=query) as answer:
            job = await answer.json()
    assert first["id"] == second["id"] or second["state"] == "queued"
    assert (job["state"], job["error"]["kind"]) == ("failed", "NotFound")


def test_every_error_has_a_status() -> None:
    for kind, status in HTTP_STATUSES:
        assert status_of(kind("x")) == status
    assert status_of(UsageError("x")) == 400
    assert status_of(CubecacheError("x")) == 500
