"""What a watcher is told: the page's events, a job's events; bounded, and ended with the daemon."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from kits.httpapi import Remote, free_port, served, write_tokens

from imagecache.daemon import eventstream
from imagecache.settings import ApiSection, Settings

SECONDS = 60


@pytest.fixture
async def remote(where: Settings, tmp_path: Path) -> AsyncIterator[Remote]:
    port = free_port()
    tokens = write_tokens(tmp_path / "tokens.toml")
    api = ApiSection(tcp=f"127.0.0.1:{port}", tokens=str(tokens), private_images=True)
    async with served(where, api), aiohttp.ClientSession() as session:
        yield Remote(session, f"http://127.0.0.1:{port}")


async def events(
    remote: Remote, who: str, path: str, wanted: int, **headers: str
) -> list[tuple[str, Any]]:
    """The first events of a stream, or all of one that ends earlier."""
    found: list[tuple[str, Any]] = []
    headers["Authorization"] = f"Bearer {who * 9}"
    async with asyncio.timeout(SECONDS):
        async with remote.session.get(remote.url + path, headers=headers) as answer:
            assert answer.status == 200
            assert answer.content_type == "text/event-stream"
            assert answer.headers["X-Request-Id"]
            rest = ""
            async for piece in answer.content.iter_any():
                *whole, rest = (rest + piece.decode()).split("\n\n")
                for event in whole:
                    name, _, data = event.partition("\n")
                    value = json.loads(data.removeprefix("data: "))
                    found.append((name.removeprefix("event: "), value))
                if len(found) >= wanted:
                    break
    return found


async def test_watchers_are_told_what_they_may_see(remote: Remote, built: str) -> None:
    """I11: of exports, jobs, images an owner is told its own, and of the host's totals nothing."""
    _, answer = await remote.call("a", "POST", "/v1/preloads", {"images": [built]})
    job = answer["preloads"][0]
    path = f"/v1/preloads/{job['id']}"
    told = await events(remote, "a", path, 10_000, Accept="text/event-stream")
    assert {name for name, _ in told} == {"preload"}
    assert told[-1][1]["state"] == "done", "the stream ends with the job"
    versions = [value["version"] for _, value in told]
    assert versions == sorted(set(versions))
    status, _ = await remote.call("b", "GET", path, Accept="text/event-stream")
    assert status == 404
    for who, jobs, totals in (("a", 1, False), ("b", 0, False), ("reader", 1, True)):
        seen: dict[str, Any] = {}
        for _ in range(100):  # images are asked for in the background
            seen = dict(await events(remote, who, "/v1/events?seconds=0", 10_000))
            if "images" in seen:
                break
            await asyncio.sleep(0.1)
        assert len(seen["preloads"]["preloads"]) == jobs
        assert len(seen["images"]["images"]) == jobs
        assert ("cache" in seen) is totals


async def test_streams_are_bounded(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """I12: one more watcher than there is room for is told so, and the next one finds room."""
    monkeypatch.setattr(eventstream, "MAX_STREAMS", 1)
    headers = {"Authorization": "Bearer " + "reader" * 9}
    async with asyncio.timeout(SECONDS):
        async with remote.session.get(remote.url + "/v1/events", headers=headers) as first:
            await first.content.readany()
            status, problem = await remote.call("reader", "GET", "/v1/events")
            assert (status, problem["title"]) == (503, "Unavailable")
        while (await remote.call("reader", "GET", "/v1/events?seconds=0"))[0] != 200:
            await asyncio.sleep(0.1)


async def test_a_stream_ends_with_the_daemon(where: Settings, tmp_path: Path) -> None:
    """A watcher does not hold up the end of a daemon."""
    port = free_port()
    tokens = write_tokens(tmp_path / "tokens.toml")
    api = ApiSection(tcp=f"127.0.0.1:{port}", tokens=str(tokens))
    headers = {"Authorization": "Bearer " + "reader" * 9}
    async with asyncio.timeout(SECONDS), aiohttp.ClientSession() as session:
        async with served(where, api):
            answer = await session.get(f"http://127.0.0.1:{port}/v1/events", headers=headers)
            await answer.content.readany()
        with pytest.raises(aiohttp.ClientError):
            while await answer.content.readany():
                pass
            raise aiohttp.ClientError("ended in order")
        answer.close()
