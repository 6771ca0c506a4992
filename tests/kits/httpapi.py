"""A daemon in this process with its API over TCP, and a caller of it."""

import asyncio
import contextlib
import dataclasses
import hashlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from imagecache.daemon.serve import serve
from imagecache.settings import ApiSection, Settings

SECRETS = {"reader": ("read", ""), "a": ("preload", "team-a"), "b": ("preload", "team-b")}
SECRETS |= {"boss": ("admin", "")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def served(where: Settings, api: ApiSection) -> AsyncIterator[None]:
    ready = asyncio.Event()
    settings = dataclasses.replace(where, api=api)
    task = asyncio.create_task(serve(settings, lambda _: ready.set()))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, return_when="FIRST_COMPLETED")
    waiting.cancel()
    if task.done():
        await task
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def write_tokens(path: Path) -> Path:
    """A tokens file of SECRETS; each token is its name nine times."""
    path.write_text(
        "".join(
            f'[tokens.{name}]\nrole = "{role}"\n'
            f'sha256 = "{hashlib.sha256(name.encode() * 9).hexdigest()}"\n'
            + (f'owner = "{owner}"\n' if owner else "")
            for name, (role, owner) in SECRETS.items()
        )
    )
    return path


class Remote:
    """The API over TCP, as whoever has a token."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def call(
        self, who: str | None, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any]:
        if who is not None:
            headers["Authorization"] = f"Bearer {who * 9}"
        async with self.session.request(
            method, self.url + path, json=body, headers=headers
        ) as answer:
            if answer.content_type.endswith("json"):
                found = await answer.json(content_type=None)
                if answer.content_type == "application/problem+json":
                    # Every problem names its request; all else is what the tests compare.
                    assert found.pop("request") == answer.headers["X-Request-Id"]
                return answer.status, found
            return answer.status, await answer.text()


async def preloaded(remote: Remote, who: str, image: str) -> str:
    """Preloads as somebody; the manifest digest."""
    _, answer = await remote.call(who, "POST", "/v1/preloads", {"images": [image]})
    job = answer["preloads"][0]
    async with asyncio.timeout(90):
        while job["result"] is None:
            assert job["error"] is None, job
            _, job = await remote.call(
                who, "GET", f"/v1/preloads/{job['id']}?wait=10&since={job['version']}"
            )
    return str(job["result"]["image"])
