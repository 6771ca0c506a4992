"""The control API's handlers of preload jobs."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from imagecache.daemon.access import Role, hidden
from imagecache.daemon.bodies import Field
from imagecache.daemon.eventstream import BEAT_SECONDS, EventStreams, wanted
from imagecache.daemon.naming import FACE, PLATFORM, requested
from imagecache.daemon.operations import Call, operation
from imagecache.daemon.service import Service
from preload.jobs import Job
from preload.planning import experience, look

MAX_WATCH_SECONDS = 86_400.0
STEP_SECONDS = 0.2
MAX_PIN_SECONDS = 366 * 86400
_IMAGES = Field("images", "texts", "References, as `cubecache preload` takes them.", required=True)
_PLAN = (
    Field("images", "texts", "References to look at.", required=True, items=20),
    PLATFORM,
    FACE,
)
_PRELOADS = (
    _IMAGES,
    PLATFORM,
    FACE,
    Field("priority", "number", "Higher goes first.", least=-100, most=100),
    Field("pin_seconds", "number", "Pin the image for so long.", least=1, most=MAX_PIN_SECONDS),
    Field(
        "limit_bytes_per_second",
        "number",
        "Bound of its downloads.",
        least=1024,
        most=2**40,
    ),
    Field(
        "warm",
        "text",
        "Bring it into this host's cache too: all of it, or what its start reads.",
        choices=("whole", "hot"),
    ),
    Field("related", "texts", "Images of the store whose chunks are used again.", items=8),
)
_WAIT = (
    Field("wait", "number", "Answer when the version changes, or after so many seconds.", most=60),
    Field("since", "number", "The version that the caller knows.", least=-1, most=2**53),
)


class PreloadRoutes:
    """One method per operation."""

    def __init__(self, service: Service, streams: EventStreams) -> None:
        self._service = service
        self._streams = streams

    def _jobs(self, call: Call) -> list[Job]:
        return [job for job in self._service.jobs.jobs() if call.caller.sees(job.owner)]

    def _job_of(self, call: Call) -> Job:
        for job in self._jobs(call):
            if job.identity == call.name:
                return job
        raise hidden("preload", call.name)

    @operation("GET", "/v1/preloads", role=Role.READ, answers={200: "Preloads"})
    async def preloads(self, call: Call) -> web.Response:
        """Every job that the caller may know of, oldest first."""
        return web.json_response({"preloads": [job.as_json() for job in self._jobs(call)]})

    @operation(
        "POST",
        "/v1/preloads",
        role=Role.PRELOAD,
        body=_PRELOADS,
        answers={202: "Preloads"},
        problems=(429, 503, 507),
    )
    async def preload(self, call: Call) -> web.Response:
        """Queue preloads, in the order of `images`; an equal request's job is found again."""
        images = [
            await requested(self._service.settings, call, text) for text in call.body["images"]
        ]
        jobs = await self._service.jobs.submit(
            images,
            owner=call.caller.owner,
            priority=int(call.body["priority"] or 0),
            pin_seconds=int(call.body["pin_seconds"] or 0),
            bytes_per_second=int(call.body["limit_bytes_per_second"] or 0),
            warm=call.body["warm"] or "",
        )
        return web.json_response({"preloads": [job.as_json() for job in jobs]}, status=202)

    @operation(
        "POST",
        "/v1/plans",
        role=Role.PRELOAD,
        body=_PLAN,
        answers={200: "Plans"},
        problems=(404, 501, 502, 503),
    )
    async def plan(self, call: Call) -> web.Response:
        """What preloads would do; nothing is changed."""
        known = experience(job.result for job in self._service.jobs.jobs() if job.result)
        plans = []
        for text in call.body["images"]:
            image = await requested(self._service.settings, call, text)
            found = await look(self._service.settings, self._service.catalog, image, known)
            plans.append(found.as_json())
        return web.json_response({"plans": plans})

    @operation(
        "GET",
        "/v1/preloads/{id}",
        role=Role.READ,
        query=_WAIT,
        answers={200: "Preload"},
        streams=True,
        problems=(404, 503),
    )
    async def preload_state(self, call: Call) -> web.StreamResponse:
        """One job; with `wait`, once it changed; as `Accept: text/event-stream`, until it ends."""
        job = self._job_of(call)
        if wanted(call.request):
            return await self._watched(call, job)
        if call.query["wait"]:
            since = call.query["since"]
            await job.watch(-1 if since is None else int(since), call.query["wait"])
        return web.json_response(job.as_json())

    async def _watched(self, call: Call, job: Job) -> web.StreamResponse:
        async with self._streams.begin(call.request) as stream:
            until = time.monotonic() + MAX_WATCH_SECONDS
            while True:
                version = job.version
                await stream.send("preload", job.as_json())
                if job.ended or time.monotonic() > until:
                    break
                await job.watch(version, BEAT_SECONDS)
                await asyncio.sleep(STEP_SECONDS)  # a build reports more often than people read
        return stream.answer

    @operation(
        "DELETE",
        "/v1/preloads/{id}",
        role=Role.PRELOAD,
        answers={200: "Preload"},
        problems=(404, 507),
    )
    async def cancel(self, call: Call) -> web.Response:
        """Cancel a job; what it downloaded stays for a later one."""
        job = await self._service.jobs.cancel(self._job_of(call).identity)
        return web.json_response(job.as_json())

    @operation(
        "POST",
        "/v1/preloads/{id}/pause",
        role=Role.PRELOAD,
        answers={200: "Preload"},
        problems=(404, 409, 422, 507),
    )
    async def pause(self, call: Call) -> web.Response:
        """Stop a job until it is resumed."""
        job = await self._service.jobs.pause(self._job_of(call).identity)
        return web.json_response(job.as_json())

    @operation(
        "POST",
        "/v1/preloads/{id}/resume",
        role=Role.PRELOAD,
        answers={200: "Preload"},
        problems=(404, 409, 422, 507),
    )
    async def resume(self, call: Call) -> web.Response:
        """Queue a paused job again; it goes on where it stopped."""
        job = await self._service.jobs.resume(self._job_of(call).identity)
        return web.json_response(job.as_json())
