"""The client of the daemon's control API, over its unix socket."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from imagecache.composition import ImageRequest
from imagecache.errors import CubecacheError, Denied, NotFound, Unavailable, UsageError, from_record
from imagecache.settings import Settings
from preload.starting import start_daemon_process, stop_daemon

ANSWER_LIMIT = 16 << 20
CALL_SECONDS = 120.0
WATCH_SECONDS = 20.0
RETRIES = 20
RETRY_SECONDS = 0.25

_GOING_ON = ("queued", "running", "paused")

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

log = logging.getLogger(__name__)

OnProgress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What an image says of how to run it; from its OCI config."""

    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    env: tuple[str, ...]
    user: str
    working_dir: str
    stop_signal: str


@dataclass(frozen=True, slots=True)
class ExportHandle:
    """An export as the daemon answered it."""

    name: str
    uri: str
    socket: Path
    image: str
    block_image: str
    size_bytes: int
    face: str
    config: RunConfig
    fields: dict[str, Any]


class Client:
    """One connection pool to one daemon; made by `connect`."""

    def __init__(
        self, session: aiohttp.ClientSession, place: str, base: str = "http://cubecache"
    ) -> None:
        """`place` is how people name the daemon: its socket's path, or its URL."""
        self.place = place
        self._session = session
        self._base = base
        self._answered = False
        self._unstored: list[dict[str, Any]] = []

    async def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """One call of the API; raises what the daemon answered, or Unavailable.

        A question whose connection breaks is asked again for some seconds: a daemon that is being
        upgraded, or started again, is not an error.
        """
        left = RETRIES if method == "GET" and self._answered else 0
        while True:
            try:
                answer = await self._call(method, path, body, query)
            except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
                if not left or isinstance(error, TimeoutError):
                    raise absent(self.place) from error
                left -= 1
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._answered = True
            return answer

    async def _call(self, method: str, path: str, body: Any, query: dict[str, Any]) -> Any:
        async with self._session.request(
            method,
            f"{self._base}{path}",
            json=body,
            params={key: str(value) for key, value in query.items()},
        ) as response:
            raw = await response.content.read(ANSWER_LIMIT)
            if response.status == 204:
                return None
            if response.content_type == "text/plain":
                return raw.decode()
            answer = _decode(raw)
        if response.status >= 400:
            raise from_record(answer if isinstance(answer, dict) else {"message": str(answer)})
        return answer

    async def submit(
        self,
        requests: Sequence[ImageRequest],
        *,
        priority: int = 0,
        pin_seconds: int = 0,
        limit_bytes_per_second: int = 0,
        warm: str | None = None,
    ) -> list[dict[str, Any]]:
        """Queues preloads and returns their jobs' JSON objects, in order; does not wait.

        All requests are of one platform and face, and related to the same images. Raises Busy
        where too many wait.
        """
        body = {
            "images": [request.reference for request in requests],
            "platform": requests[0].platform,
            "fs": requests[0].face,
            "priority": priority,
            "pin_seconds": pin_seconds or None,
            "limit_bytes_per_second": limit_bytes_per_second or None,
            "warm": warm,
            "related": list(requests[0].related) or None,
        }
        jobs: list[dict[str, Any]] = (await self.call("POST", "/v1/preloads", body))["preloads"]
        return jobs

    async def wait(self, job: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """A job's result, once it is done; raises what it failed with."""
        while job["state"] in _GOING_ON:
            on_progress(job)
            job = await self._next(job)
        return self._result(job)

    async def _next(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job once it has changed, or after a while."""
        answer: dict[str, Any] = await self.call(
            "GET", f"/v1/preloads/{job['id']}", wait=WATCH_SECONDS, since=job["version"]
        )
        return answer

    @staticmethod
    def _result(job: dict[str, Any]) -> dict[str, Any]:
        if job["error"]:
            raise from_record(job["error"])
        if job["result"] is None:
            raise CubecacheError(f"the preload of {job['image']} was {job['state']}")
        result: dict[str, Any] = job["result"]
        return result

    async def preload(self, request: ImageRequest, on_progress: OnProgress) -> dict[str, Any]:
        """Hands a preload to the daemon and waits for its end; the result's JSON object."""
        (job,) = await self.submit([request])
        return await self.wait(job, on_progress)

    async def plan(self, requests: Sequence[ImageRequest]) -> list[dict[str, Any]]:
        """What preloads would do (`preload.planning.Plan` as JSON); changes nothing."""
        plans: list[dict[str, Any]] = []
        for request in requests:
            body = {
                "images": [request.reference],
                "platform": request.platform,
                "fs": request.face,
            }
            plans += (await self.call("POST", "/v1/plans", body))["plans"]
        return plans

    async def jobs(self) -> list[dict[str, Any]]:
        """All jobs that the daemon remembers, oldest first."""
        answer: list[dict[str, Any]] = (await self.call("GET", "/v1/preloads"))["preloads"]
        return answer

    async def cancel(self, identity: str) -> dict[str, Any]:
        """Cancels a job; what it downloaded stays."""
        answer: dict[str, Any] = await self.call("DELETE", f"/v1/preloads/{identity}")
        return answer

    async def pause(self, identity: str) -> dict[str, Any]:
        """Stops a job until `resume`."""
        return await self._change(identity, "pause")

    async def resume(self, identity: str) -> dict[str, Any]:
        """Queues a paused job again."""
        return await self._change(identity, "resume")

    async def _change(self, identity: str, what: str) -> dict[str, Any]:
        answer: dict[str, Any] = await self.call("POST", f"/v1/preloads/{identity}/{what}")
        return answer

    async def export(
        self,
        image: str,
        *,
        socket: Path | None = None,
        name: str | None = None,
        fill: str | None = None,
        record: bool = False,
        writable: bool = False,
        platform: str | None = None,
        face: str = "erofs",
        on_progress: OnProgress = lambda _: None,
    ) -> ExportHandle:
        """Exports an image, preloading it first if nobody has."""
        request = ImageRequest.parse(image, platform, face)
        body = {
            "image": request.reference,
            "platform": platform,
            "fs": face,
            "socket": str(Path.cwd() / socket) if socket else None,
            "name": name,
            "fill": fill,
            "record": record,
            "writable": writable,
        }
        try:
            answer = await self.call("POST", "/v1/exports", body)
        except NotFound:
            (job,) = await self.submit([request])
            answer = await self._export_of(job, body, on_progress)
        return handle(answer)

    async def _export_of(
        self, job: dict[str, Any], body: dict[str, Any], on_progress: OnProgress
    ) -> Any:
        """Exports an image that is being preloaded, as soon as it can be read."""
        while job["state"] in _GOING_ON:
            on_progress(job)
            if job["readable"]:
                try:
                    answer = await self.call("POST", "/v1/exports", body)
                except NotFound:
                    break  # its build ended meanwhile, one way or another
                self._unstored.append(job)
                return answer
            job = await self._next(job)
        await self.wait(job, on_progress)
        return await self.call("POST", "/v1/exports", body)

    async def settle(self) -> None:
        """Waits until what was exported ahead of being stored is stored; tells of what is not."""
        while self._unstored:
            job = self._unstored.pop()
            try:
                await self.wait(job, lambda _: None)
            except CubecacheError as error:
                log.warning("%s is not stored: %s", job["image"], error)

    async def exports(self) -> list[dict[str, Any]]:
        """All exports of the daemon."""
        answer: list[dict[str, Any]] = (await self.call("GET", "/v1/exports"))["exports"]
        return answer

    async def unexport(self, name: str, *, force: bool = False) -> None:
        """Ends an export; Busy while a client is attached, unless forced."""
        await self.call("DELETE", f"/v1/exports/{name}", force=int(force))

    async def explain(self, name: str) -> dict[str, Any]:
        """The report of an export's start (`imagecache.explain.report`)."""
        answer: dict[str, Any] = await self.call("GET", f"/v1/exports/{name}/start")
        return answer

    async def record(self, name: str, seconds: float | None) -> dict[str, Any]:
        """Begins a recording of what an export reads; Busy where one goes on."""
        answer: dict[str, Any] = await self.call(
            "POST", f"/v1/exports/{name}/recording", {"seconds": seconds}
        )
        return answer

    async def stop_recording(self, name: str) -> dict[str, Any]:
        """Ends a recording; its profile and boot pack are stored when this returns."""
        answer: dict[str, Any] = await self.call("DELETE", f"/v1/exports/{name}/recording")
        return answer


def handle(answer: dict[str, Any]) -> ExportHandle:
    """An export's JSON object as a typed handle."""
    config = answer["config"]
    return ExportHandle(
        name=answer["name"],
        uri=answer["uri"],
        socket=Path(answer["socket"]),
        image=answer["image"],
        block_image=answer["block_image"],
        size_bytes=answer["size_bytes"],
        face=answer["fs"],
        config=RunConfig(
            entrypoint=tuple(config["entrypoint"]),
            cmd=tuple(config["cmd"]),
            env=tuple(config["env"]),
            user=config["user"],
            working_dir=config["working_dir"],
            stop_signal=config["stop_signal"],
        ),
        fields=answer,
    )


def absent(place: Path | str) -> Unavailable:
    """The error of a daemon that does not answer."""
    return Unavailable(f"no daemon answers on {place}", remedy="start one: cubecache serve")


@asynccontextmanager
async def connect(settings: Settings, *, start: bool = True) -> AsyncIterator[Client]:
    """A client of the state directory's daemon; with `start`, of a temporary one if none runs."""
    process: subprocess.Popen[bytes] | None = None
    if start and not await answers(settings):
        process = await start_daemon(settings)
    try:
        async with _client(settings) as client:
            if process is None and not await answers(settings):
                raise absent(settings.control_socket)
            yield client
            if process is not None:
                await client.settle()  # a temporary daemon's builds end with it
    finally:
        if process is not None:
            await stop_daemon(process)


@asynccontextmanager
async def _client(settings: Settings) -> AsyncIterator[Client]:
    connector = aiohttp.UnixConnector(path=str(settings.control_socket))
    timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session, str(settings.control_socket))


@asynccontextmanager
async def connect_url(
    url: str, *, token: str | None = None, ca_file: Path | None = None
) -> AsyncIterator[Client]:
    """A client of a daemon elsewhere: `https://HOST:PORT`, or `http://` on this host.

    `token` is one that its `[api] tokens` knows. Raises UsageError for other URLs.
    """
    parsed = urlsplit(url)
    if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.path.strip("/"):
        raise UsageError(f"{url!r} is no daemon's URL", remedy="write https://HOST:PORT")
    if parsed.username or parsed.query or parsed.fragment:
        raise UsageError("a daemon's URL has a host and a port, no more")
    if parsed.scheme == "http" and token and parsed.hostname not in _LOOPBACK:
        raise UsageError(f"{url} would be sent the token in the clear", remedy="use https")
    context: ssl.SSLContext | bool = True
    if ca_file is not None:
        try:
            context = await asyncio.to_thread(ssl.create_default_context, cafile=ca_file)
        except OSError as error:
            raise Denied(f"certificates {ca_file}: {error}") from error
    base = f"{parsed.scheme}://{parsed.netloc}"
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context),
        timeout=aiohttp.ClientTimeout(total=CALL_SECONDS),
        headers=headers,
    ) as session:
        yield Client(session, base, base)


async def answers(settings: Settings) -> bool:
    """Whether a daemon of this state directory answers."""
    async with _client(settings) as client:
        try:
            async with asyncio.timeout(5):
                await client.call("GET", "/healthz")
        except (Unavailable, TimeoutError):
            return False
    return True


async def start_daemon(settings: Settings, *, detached: bool = False) -> subprocess.Popen[bytes]:
    """Starts a daemon and waits until it answers; its log goes to STATE/daemon.log."""
    return await start_daemon_process(settings, answers, detached=detached)


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return {"message": f"the daemon answered {raw[:200]!r}"}
