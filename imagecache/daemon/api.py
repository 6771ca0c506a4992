"""The HTTP control API: routes, bodies, problem documents. It decides nothing; the service does."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from imagecache.composition import ImageRequest
from imagecache.daemon.metrics import exposition
from imagecache.daemon.service import ExportRequest, Service
from imagecache.errors import (
    Busy,
    Corrupt,
    CubecacheError,
    Denied,
    LimitExceeded,
    NoSpace,
    NotFound,
    Rejected,
    Unavailable,
    Unsupported,
    UsageError,
    as_record,
)

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 20
MAX_WAIT_SECONDS = 60.0
MAX_RECORD_SECONDS = 3600.0

# The one table of HTTP statuses; the first row that matches decides.
HTTP_STATUSES: tuple[tuple[type[CubecacheError], int], ...] = (
    (UsageError, 400),
    (LimitExceeded, 413),
    (Rejected, 422),
    (NotFound, 404),
    (Denied, 403),
    (Busy, 409),
    (NoSpace, 507),
    (Unsupported, 501),
    (Unavailable, 503),
    (Corrupt, 502),
    (CubecacheError, 500),
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def status_of(error: CubecacheError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status in HTTP_STATUSES if isinstance(error, kind))


def problem(error: CubecacheError) -> web.Response:
    """An error as a problem document (RFC 9457) with the error's kind and remedy."""
    status = status_of(error)
    record = as_record(error)
    body = {"type": "about:blank", "title": record["kind"], "status": status} | record
    body["detail"] = record["message"]
    return web.json_response(body, status=status, content_type="application/problem+json")


@web.middleware
async def typed_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns typed errors into problem documents, and hides what is not ours behind a 500."""
    try:
        return await handler(request)
    except CubecacheError as error:
        return problem(error)
    except web.HTTPException as error:
        kinds: dict[int, type[CubecacheError]] = {404: NotFound, 413: LimitExceeded}
        kind = kinds.get(error.status, UsageError)
        answer = problem(kind(f"{request.method} {request.path}: {error.reason}"))
        answer.set_status(error.status)
        return answer
    except Exception as error:
        logger.exception("%s %s failed", request.method, request.path)
        return problem(CubecacheError(f"internal error: {type(error).__name__}"))


def application(service: Service) -> web.Application:
    """The API over one service."""
    routes = _Routes(service)
    app = web.Application(middlewares=[typed_errors], client_max_size=MAX_BODY)
    app.add_routes(
        [
            web.get("/healthz", routes.healthy),
            web.get("/readyz", routes.ready),
            web.get("/metrics", routes.metrics),
            web.get("/v1/status", routes.status),
            web.get("/v1/exports", routes.exports),
            web.post("/v1/exports", routes.export),
            web.delete("/v1/exports/{name}", routes.unexport),
            web.get("/v1/exports/{name}/start", routes.start),
            web.post("/v1/exports/{name}/recording", routes.record),
            web.delete("/v1/exports/{name}/recording", routes.stop_recording),
            web.get("/v1/preloads", routes.preloads),
            web.post("/v1/preloads", routes.preload),
            web.get("/v1/preloads/{id}", routes.preload_state),
            web.delete("/v1/preloads/{id}", routes.cancel),
        ]
    )
    return app


class _Routes:
    """One method per route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def healthy(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, _: web.Request) -> web.Response:
        ready = self._service.ready
        return web.json_response(
            {"status": "ready" if ready else "starting"}, status=200 if ready else 503
        )

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=exposition(self._service), content_type="text/plain")

    async def status(self, _: web.Request) -> web.Response:
        return web.json_response(self._service.status())

    async def exports(self, _: web.Request) -> web.Response:
        return web.json_response({"exports": [x.as_json() for x in self._service.exports()]})

    async def export(self, request: web.Request) -> web.Response:
        body = await _body(
            request,
            {"image": str},
            {"platform": str, "fs": str, "socket": str, "name": str, "fill": str, "record": bool},
        )
        image = ImageRequest.parse(body["image"], body["platform"], body["fs"] or "erofs")
        wanted = ExportRequest(
            image, body["socket"], body["name"], body["fill"], record=bool(body["record"])
        )
        export = await self._service.export(wanted)
        return web.json_response(export.as_json(), status=201)

    async def unexport(self, request: web.Request) -> web.Response:
        force = request.query.get("force") == "1"
        await self._service.unexport(request.match_info["name"], force=force)
        return web.Response(status=204)

    async def start(self, request: web.Request) -> web.Response:
        start = self._service.start_of(request.match_info["name"])
        return web.json_response(await start.explain())

    async def record(self, request: web.Request) -> web.Response:
        body = await _body(request, {}, {"seconds": float})
        seconds = body["seconds"]
        if seconds is not None and not 0 < seconds <= MAX_RECORD_SECONDS:
            raise UsageError(f"a recording lasts up to {MAX_RECORD_SECONDS:.0f} seconds")
        start = self._service.start_of(request.match_info["name"])
        start.record(seconds)
        return web.json_response(start.summary(), status=202)

    async def stop_recording(self, request: web.Request) -> web.Response:
        start = self._service.start_of(request.match_info["name"])
        return web.json_response(await start.stop_recording())

    async def preloads(self, _: web.Request) -> web.Response:
        return web.json_response({"preloads": [x.as_json() for x in self._service.jobs.jobs()]})

    async def preload(self, request: web.Request) -> web.Response:
        body = await _body(request, {"image": str}, {"platform": str, "fs": str})
        image = ImageRequest.parse(body["image"], body["platform"], body["fs"] or "erofs")
        return web.json_response(self._service.jobs.submit(image).as_json(), status=202)

    async def preload_state(self, request: web.Request) -> web.Response:
        job = self._service.jobs.get(request.match_info["id"])
        seconds = _number(request, "wait", 0.0, MAX_WAIT_SECONDS)
        if seconds:
            await job.watch(int(_number(request, "since", -1.0, 1e15)), seconds)
        return web.json_response(job.as_json())

    async def cancel(self, request: web.Request) -> web.Response:
        return web.json_response(self._service.jobs.cancel(request.match_info["id"]).as_json())


def _number(request: web.Request, name: str, default: float, most: float) -> float:
    raw = request.query.get(name)
    if raw is None:
        return default
    try:
        value = float(raw)
    except ValueError:
        value = float("nan")
    if not -1 <= value <= most:
        raise UsageError(f"query parameter {name}={raw!r} is not a number up to {most:.0f}")
    return value


async def _body(
    request: web.Request, required: dict[str, type], optional: dict[str, type]
) -> dict[str, Any]:
    """The request's JSON object, every field present (None where left out); UsageError else."""
    if request.content_type != "application/json":
        raise UsageError("the body must be application/json")
    raw = await request.read()
    try:
        fields = json.loads(raw, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UsageError("the body is not a JSON object")
    kinds = required | optional
    wrong = [name for name in required if fields.get(name) is None]
    wrong += [name for name in fields if name not in kinds]
    wrong += [
        name
        for name, value in fields.items()
        if name in kinds and value is not None and type(value) is not kinds[name]
    ]
    if wrong:
        raise UsageError(f"missing, unknown or mistyped fields: {', '.join(sorted(set(wrong)))}")
    return {name: fields.get(name) for name in kinds}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
