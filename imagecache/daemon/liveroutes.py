"""The control API's handlers for who watches: the cache's counters, the live events, the page."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from aiohttp import web

from imagecache.daemon.access import Caller, Role
from imagecache.daemon.bodies import Field
from imagecache.daemon.eventstream import MEDIA
from imagecache.daemon.exports import LiveExport
from imagecache.daemon.loopwatch import LoopWatch
from imagecache.daemon.operations import Call, operation
from imagecache.daemon.ownership import owned_images
from imagecache.daemon.page import CONTENT_SECURITY_POLICY, asset
from imagecache.daemon.service import Service
from imagecache.daemon.watched import Watched
from imagecache.store.base import Priority

MAX_SECONDS = 3600.0
TICK_SECONDS = 2.0
SHOWN = 200
IMAGES_AGE_SECONDS = 30.0
_SECONDS = (Field("seconds", "number", "The stream ends after so long.", most=MAX_SECONDS),)


class LiveRoutes:
    """One method per operation."""

    def __init__(self, service: Service, watched: Watched) -> None:
        self._service = service
        self._watched = watched

    @operation("GET", "/v1/cache", role=Role.READ, answers={200: "Cache"})
    async def cache(self, call: Call) -> web.Response:
        """The host's cache and where its bytes came from, since the daemon began."""
        call.caller.require_whole("the host's counters")
        return web.json_response(cache_json(self._service, self._watched.loop))

    @operation(
        "GET", "/v1/events", role=Role.READ, query=_SECONDS, answers={200: MEDIA}, problems=(503,)
    )
    async def events(self, call: Call) -> web.StreamResponse:
        """What changes, as server-sent events: status, exports, preloads, images, cache."""
        seconds = call.query["seconds"]
        until = time.monotonic() + (MAX_SECONDS if seconds is None else seconds)
        async with self._watched.streams.begin(call.request) as stream:
            while True:
                for name, value in self._told(call.caller).items():
                    await stream.send(name, value)
                if time.monotonic() + TICK_SECONDS > until:
                    break
                await asyncio.sleep(TICK_SECONDS)
        return stream.answer

    def _told(self, caller: Caller) -> dict[str, Any]:
        service = self._service
        exports = [x for x in service.exports() if caller.sees(x.record.owner or "")]
        jobs = [x for x in service.jobs.jobs() if caller.sees(x.owner)]
        jobs.sort(key=lambda job: (job.ended, -job.submitted))
        told = {
            "status": service.status() | {"exports": len(exports), "owner": caller.owner},
            "exports": {
                "exports": [_shown(export) for export in exports[:SHOWN]],
                "left_out": max(0, len(exports) - SHOWN),
            },
            "preloads": {
                "preloads": [job.as_json() for job in jobs[:SHOWN]],
                "left_out": max(0, len(jobs) - SHOWN),
            },
        }
        images, error = self._watched.realm.images(IMAGES_AGE_SECONDS)
        if images is not None:
            owned = owned_images(service, caller)
            seen = [x for x in images if owned is None or x["image"] in owned]
            told["images"] = {"images": seen[:SHOWN], "left_out": max(0, len(seen) - SHOWN)}
        if images is None or error:
            told["store"] = {"error": error}
        if not caller.owner:
            told["cache"] = cache_json(service, self._watched.loop)
        return told

    # --- the page

    @operation("GET", "/", role=None, answers={200: "text/html"})
    async def page(self, _: Call) -> web.Response:
        """The status page; it holds no data, and asks this API for it with the viewer's token."""
        return _asset("index.html", "text/html")

    @operation("GET", "/page/page.css", role=None, answers={200: "text/css"})
    async def page_style(self, _: Call) -> web.Response:
        """The status page's style."""
        return _asset("page.css", "text/css")

    @operation("GET", "/page/page.js", role=None, answers={200: "text/javascript"})
    async def page_script(self, _: Call) -> web.Response:
        """The status page's program."""
        return _asset("page.js", "text/javascript")


def _asset(name: str, media: str) -> web.Response:
    answer = web.Response(text=asset(name), content_type=media, charset="utf-8")
    answer.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    return answer


def _shown(export: LiveExport) -> dict[str, Any]:
    shown = export.as_json()
    del shown["config"]  # may hold secrets of the image's environment, and is long
    return shown


def cache_json(service: Service, loop: LoopWatch | None) -> dict[str, Any]:
    """The host's cache in numbers; bytes and seconds, counts since the daemon began."""
    counters = service.nbd.counters
    fetched = service.fetcher.counters
    return {
        "arena": asdict(service.arena.stats()),
        "reads": {
            name: getattr(counters, name)
            for name in ("hits", "misses", "errors", "bytes_sent", "connections")
        },
        "fetched": {
            **{
                kind.name.lower(): asdict(counts)
                for kind, counts in zip(Priority, fetched.by_class, strict=True)
            },
            "joins": fetched.joins,
            "corrupt_bodies": fetched.corrupt_bodies,
        },
        "sources": service.opened.counters.snapshot(),
        "loop": None
        if loop is None
        else {
            "late_p99_seconds": loop.late.quantile(0.99),
            "worst_seconds": round(loop.worst_seconds, 4),
        },
    }
