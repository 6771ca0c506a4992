"""The client of the daemon's control API, over its unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from imagecache.composition import ImageRequest
from imagecache.errors import Busy, CubecacheError, NotFound, Unavailable, exit_code, from_record
from imagecache.settings import Settings

ANSWER_LIMIT = 16 << 20
CALL_SECONDS = 120.0
WATCH_SECONDS = 20.0
START_SECONDS = 30.0
BUSY_STATUS = exit_code(Busy(""))

_GOING_ON = ("queued", "running", "paused")

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

    def __init__(self, session: aiohttp.ClientSession, socket: Path) -> None:
        self._session = session
        self._socket = socket
        self._unstored: list[dict[str, Any]] = []

    async def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """One call of the API; raises what the daemon answered, or Unavailable."""
        try:
            async with self._session.request(
                method,
                f"http://cubecache{path}",
                json=body,
                params={key: str(value) for key, value in query.items()},
            ) as response:
                raw = await response.content.read(ANSWER_LIMIT)
                if response.status == 204:
                    return None
                if response.content_type == "text/plain":
                    return raw.decode()
                answer = _decode(raw)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise absent(self._socket) from error
        if response.status >= 400:
            raise from_record(answer if isinstance(answer, dict) else {"message": str(answer)})
        return answer

    async def submit(
        self, requests: Sequence[ImageRequest], *, priority: int = 0, pin_seconds: int = 0
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


def absent(socket: Path) -> Unavailable:
    """The error of a daemon that does not answer."""
    return Unavailable(f"no daemon answers on {socket}", remedy="start one: cubecache serve")


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
        yield Client(session, settings.control_socket)


async def answers(settings: Settings) -> bool:
    """Whether a daemon of this state directory answers."""
    async with _client(settings) as client:
        try:
            async with asyncio.timeout(5):
                await client.call("GET", "/healthz")
        except (Unavailable, TimeoutError):
            return False
    return True


def serve_command(settings: Settings, *, detached: bool) -> list[str]:
    """The command line of a daemon with these settings; one not detached ends with its starter."""
    command = [sys.executable, "-m", "imagecache", "--state-dir", str(settings.state_dir)]
    command += ["--store", settings.store_url]
    if settings.config_file:
        command += ["--config", str(settings.config_file)]
    return [*command, "serve", *([] if detached else ["--until-stdin-closes"])]


async def start_daemon(settings: Settings, *, detached: bool = False) -> subprocess.Popen[bytes]:
    """Starts a daemon and waits until it answers; its log goes to STATE/daemon.log."""
    environment = {**os.environ, "CUBECACHE_REALM": settings.realm}

    def spawn() -> subprocess.Popen[bytes]:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (settings.state_dir / "daemon.log").open("ab") as log:
            return subprocess.Popen(
                serve_command(settings, detached=detached),
                stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    process = await asyncio.to_thread(spawn)
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await answers(settings):
                if process.poll() == BUSY_STATUS:
                    # A daemon that was told to end still drains and holds the arena's lock.
                    await asyncio.sleep(0.2)
                    process = await asyncio.to_thread(spawn)
                elif process.poll() is not None:
                    raise Unavailable(
                        f"a daemon could not start (exit status {process.returncode})",
                        remedy=f"see {settings.state_dir / 'daemon.log'}",
                    )
                await asyncio.sleep(0.05)
    except BaseException as error:
        await stop_daemon(process)
        if isinstance(error, TimeoutError):
            raise Unavailable(
                f"a daemon was not ready within {START_SECONDS:.0f} seconds",
                remedy=f"see {settings.state_dir / 'daemon.log'}",
            ) from error
        raise
    return process


async def stop_daemon(process: subprocess.Popen[bytes]) -> None:
    """Ends a daemon that `start_daemon` started: TERM, then KILL after ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.to_thread(process.wait, 10)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait)
    finally:
        if process.stdin is not None:
            process.stdin.close()


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return {"message": f"the daemon answered {raw[:200]!r}"}
