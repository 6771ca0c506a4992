"""The HTTP control API's handlers. They decide nothing; the service does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from imagecache.daemon.access import Caller, Role, Tokens, hidden
from imagecache.daemon.bodies import Field, checked, decoded, query_values
from imagecache.daemon.exports import LiveExport
from imagecache.daemon.gate import MAX_BODY, Gate
from imagecache.daemon.liveroutes import LiveRoutes
from imagecache.daemon.metrics import exposed
from imagecache.daemon.naming import FACE, PLATFORM, requested
from imagecache.daemon.openapi import document
from imagecache.daemon.operations import Call, Operation, operation, operations_of
from imagecache.daemon.ownership import require_owned
from imagecache.daemon.preloadroutes import PreloadRoutes
from imagecache.daemon.realmroutes import RealmRoutes
from imagecache.daemon.service import ExportRequest, Service
from imagecache.daemon.upgrade import Upgrade
from imagecache.daemon.upgraderoutes import UpgradeRoutes
from imagecache.daemon.watched import Timings, Watched
from imagecache.explain.page import figures_html, page_html
from imagecache.logcontext import about
from imagecache.settings import FILLS

GATE: web.AppKey[Gate] = web.AppKey("gate", Gate)
MAX_RECORD_SECONDS = 3600.0
START_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"

_IMAGE = Field("image", "text", "A reference, as `cubecache preload` takes it.", required=True)
_EXPORT = (
    _IMAGE,
    PLATFORM,
    FACE,
    Field("socket", "text", "A unix socket of its own; admin only.", most=107),
    Field("name", "text", "The export's name.", most=128, pattern="[A-Za-z0-9][A-Za-z0-9._-]*"),
    Field("fill", "text", "How much to fetch in the background.", choices=FILLS),
    Field("record", "flag", "Record what the start reads."),
    Field("writable", "flag", "Over an overlay of its own, which ends with the export."),
)
_RECORDING = (Field("seconds", "number", "Its length.", least=0.001, most=MAX_RECORD_SECONDS),)
_PART = (
    Field(
        "part",
        "text",
        "The whole page, or its figures without style.",
        choices=("page", "figures"),
    ),
)
_FORCE = (Field("force", "flag", "Even while clients are attached; admin only."),)


def application(
    service: Service, tokens: Tokens | None = None, upgrade: Upgrade | None = None
) -> web.Application:
    """The API over one service; without tokens nobody gets in over TCP."""
    gate = Gate(tokens or Tokens(), Role.parse(service.settings.api.group_role))
    watched = Watched(service)
    handlers = [
        handler
        for routes in (
            Routes(service, watched),
            PreloadRoutes(service, watched.streams),
            RealmRoutes(service),
            LiveRoutes(service, watched),
            UpgradeRoutes(upgrade or Upgrade(service)),
        )
        for handler in operations_of(routes)
    ]
    app = web.Application(middlewares=[gate.middleware], client_max_size=MAX_BODY)
    app[GATE] = gate
    app.on_response_prepare.append(gate.mark)
    app.on_shutdown.append(watched.streams.end)
    app.cleanup_ctx.append(watched.run)
    for declared, handler in handlers:
        app.router.add_route(
            declared.method, declared.path, _admitted(gate, watched.timings, declared, handler)
        )
    return app


def _admitted(
    gate: Gate,
    timings: Timings,
    declared: Operation,
    handler: Callable[[Call], Awaitable[web.StreamResponse]],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The handler behind its declaration: role, body, query, repeats."""

    async def admit(request: web.Request) -> web.StreamResponse:
        if declared.role is None:
            return await handler(Call(request, caller=_NOBODY))
        caller = gate.caller(request)
        caller.require(declared.role, f"{request.method} {request.path[:200]}")
        query = query_values(list(request.query.items()), declared.query)
        raw = b"" if declared.body is None else await gate.body(request)
        body = {} if declared.body is None else checked(decoded(raw), declared.body)
        call = Call(request, caller, body, query)
        place = request.match_info
        with about(export=place.get("name", ""), job=place.get("id", ""), owner=caller.owner):
            if declared.method != "POST":
                return await handler(call)
            return await gate.once(request, caller, raw, lambda _: handler(call))

    async def handle(request: web.Request) -> web.StreamResponse:
        with timings.of(declared.identity):
            return await admit(request)

    return handle


_NOBODY = Caller("nobody", Role.READ)


class Routes:
    """One method per operation."""

    def __init__(self, service: Service, watched: Watched) -> None:
        self._service = service
        self._watched = watched

    def _export_of(self, call: Call) -> LiveExport:
        """The named export, if the caller may know of it."""
        for export in self._service.exports():
            if export.record.name == call.name and call.caller.sees(export.record.owner or ""):
                return export
        raise hidden("export", call.name)

    @operation("GET", "/healthz", role=None, answers={200: "Health"})
    async def healthy(self, _: Call) -> web.Response:
        """Whether the process answers."""
        return web.json_response({"status": "ok"})

    @operation("GET", "/readyz", role=None, answers={200: "Health", 503: "Health"})
    async def ready(self, _: Call) -> web.Response:
        """Whether exports are restored and served."""
        ready = self._service.ready
        status = 200 if ready else 503
        return web.json_response({"status": "ready" if ready else "starting"}, status=status)

    @operation("GET", "/v1/openapi.json", role=None, answers={200: "OpenApi"})
    async def openapi(self, _: Call) -> web.Response:
        """This description."""
        return web.json_response(document(declared_operations()))

    @operation("GET", "/metrics", role=Role.READ, answers={200: "text/plain"})
    async def metrics(self, call: Call) -> web.Response:
        """Metrics in Prometheus' text format; for an owner, of its own exports and jobs only."""
        text = await exposed(self._service, self._watched, call.caller)
        return web.Response(text=text, content_type="text/plain")

    @operation("GET", "/v1/status", role=Role.READ, answers={200: "Status"})
    async def status(self, call: Call) -> web.Response:
        """What the daemon is doing."""
        seen = [x for x in self._service.exports() if call.caller.sees(x.record.owner or "")]
        return web.json_response(self._service.status() | {"exports": len(seen)})

    @operation("GET", "/v1/exports", role=Role.READ, answers={200: "Exports"})
    async def exports(self, call: Call) -> web.Response:
        """Every export that the caller may know of."""
        seen = [x for x in self._service.exports() if call.caller.sees(x.record.owner or "")]
        return web.json_response({"exports": [export.as_json() for export in seen]})

    @operation(
        "POST",
        "/v1/exports",
        role=Role.PRELOAD,
        body=_EXPORT,
        answers={200: "Export", 201: "Export"},
        problems=(404, 409, 501, 502, 503, 507),
    )
    async def export(self, call: Call) -> web.Response:
        """Export a preloaded image; the same again is the same export."""
        body = call.body
        if body["socket"] is not None:
            call.caller.require(Role.ADMIN, "a socket of one's own")
        image = await requested(self._service.settings, call, body["image"])
        await require_owned(self._service, call.caller, image)
        wanted = ExportRequest(
            image,
            body["socket"],
            body["name"],
            body["fill"],
            record=bool(body["record"]),
            owner=call.caller.owner,
            writable=bool(body["writable"]),
        )
        before = self._service.exports()
        export = await self._service.export(wanted)
        status = 200 if any(export is known for known in before) else 201
        return web.json_response(export.as_json(), status=status)

    @operation(
        "GET", "/v1/exports/{name}", role=Role.READ, answers={200: "Export"}, problems=(404,)
    )
    async def one_export(self, call: Call) -> web.Response:
        """One export."""
        return web.json_response(self._export_of(call).as_json())

    @operation(
        "DELETE",
        "/v1/exports/{name}",
        role=Role.PRELOAD,
        query=_FORCE,
        answers={204: None},
        problems=(404, 409, 507),
    )
    async def unexport(self, call: Call) -> web.Response:
        """End an export; 409 while a client is attached, unless forced."""
        force = bool(call.query["force"])
        if force:
            call.caller.require(Role.ADMIN, "force")
        await self._service.unexport(self._export_of(call).record.name, force=force)
        return web.Response(status=204)

    @operation(
        "GET",
        "/v1/exports/{name}/start",
        role=Role.READ,
        answers={200: "StartReport"},
        problems=(404, 502, 503),
    )
    async def start(self, call: Call) -> web.Response:
        """Why an export's start took as long as it did."""
        start = self._service.start_of(self._export_of(call).record.name)
        return web.json_response(await start.explain())

    @operation(
        "GET",
        "/v1/exports/{name}/start/page",
        role=Role.READ,
        query=_PART,
        answers={200: "text/html"},
        problems=(404, 502, 503),
    )
    async def start_page(self, call: Call) -> web.Response:
        """The same with the waterfall and the map of the disk, as one HTML page without script."""
        start = self._service.start_of(self._export_of(call).record.name)
        report = await start.explain()
        made = figures_html if call.query["part"] == "figures" else page_html
        answer = web.Response(text=await asyncio.to_thread(made, report), content_type="text/html")
        answer.headers["Content-Security-Policy"] = START_POLICY
        return answer

    @operation(
        "POST",
        "/v1/exports/{name}/recording",
        role=Role.PRELOAD,
        body=_RECORDING,
        answers={202: "Recording"},
        problems=(404, 409),
    )
    async def record(self, call: Call) -> web.Response:
        """Begin a recording of what an export reads."""
        start = self._service.start_of(self._export_of(call).record.name)
        start.record(call.body["seconds"])
        return web.json_response(start.summary(), status=202)

    @operation(
        "DELETE",
        "/v1/exports/{name}/recording",
        role=Role.PRELOAD,
        answers={200: "Recording"},
        problems=(404, 409, 502, 503),
    )
    async def stop_recording(self, call: Call) -> web.Response:
        """End a recording; its profile and boot pack are stored by then."""
        start = self._service.start_of(self._export_of(call).record.name)
        return web.json_response(await start.stop_recording())


def declared_operations() -> list[Operation]:
    """Every operation of the API, without a service."""
    kinds = (Routes, PreloadRoutes, RealmRoutes, LiveRoutes, UpgradeRoutes)
    return [item for kind in kinds for item, _ in operations_of(kind.__new__(kind))]
