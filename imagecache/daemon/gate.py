"""What stands before every handler of the control API: identity, limits, repeats, idle clients."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from uuid import uuid4

from aiohttp import web
from aiohttp.typedefs import Middleware

from imagecache.daemon.access import Caller, Role, Tokens, peer_caller
from imagecache.daemon.problems import REQUEST_ID, http_problem, problem
from imagecache.errors import Busy, CubecacheError, Denied, Rejected, UsageError
from imagecache.logcontext import about

logger = logging.getLogger(__name__)

MAX_BODY = 1 << 20
BODY_SECONDS = 10.0
IDLE_SECONDS = 15.0
SWEEP_SECONDS = 1.0
MAX_CONNECTIONS = 512
KEPT_ANSWERS = 1000
_KEY = re.compile(r"[A-Za-z0-9_.-]{1,128}")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gate:
    """Middleware and idle-client watch of one application; holds the tokens and kept answers."""

    def __init__(self, tokens: Tokens, group_role: Role) -> None:
        self.tokens = tokens
        self._group_role = group_role
        self._uid = os.getuid()
        self._answers: OrderedDict[tuple[str, ...], asyncio.Future[_Kept]] = OrderedDict()
        self._serving: set[object] = set()
        self._seen: dict[object, float] = {}

    def caller(self, request: web.Request) -> Caller:
        """Who sent a request; Unauthenticated over TCP without a known token."""
        transport = request.transport
        sock = transport.get_extra_info("socket") if transport is not None else None
        if sock is not None and sock.family == socket.AF_UNIX:
            return peer_caller(sock, self._uid, self._group_role)
        return self.tokens.caller(request.headers.get("Authorization"))

    @property
    def middleware(self) -> Middleware:
        """Typed errors to problem documents; a request's id; no foreign page (I10)."""

        @web.middleware
        async def pass_through(request: web.Request, handler: Handler) -> web.StreamResponse:
            identity = request.headers.get("X-Request-Id", "")
            if not _KEY.fullmatch(identity):
                identity = uuid4().hex
            request[REQUEST_ID] = identity
            began = time.perf_counter()
            self._serving.add(request.protocol)
            try:
                with about(request=identity):
                    answer = await self._answered(request, handler)
                    if request.method != "GET" or answer.status >= 500:
                        seconds = time.perf_counter() - began
                        path = request.path[:200]
                        logger.info(
                            "%s %s: %d, %.3f s", request.method, path, answer.status, seconds
                        )
            finally:
                self._serving.discard(request.protocol)
                self._seen[request.protocol] = asyncio.get_running_loop().time()
            return answer

        return pass_through

    async def mark(self, request: web.Request, answer: web.StreamResponse) -> None:
        """The headers of every answer; for the application's `on_response_prepare`."""
        answer.headers["X-Request-Id"] = request.get(REQUEST_ID, "")
        answer.headers["Cache-Control"] = "no-store"
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        answer.headers.setdefault("Content-Security-Policy", "default-src 'none'")

    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if "Origin" in request.headers:
                # Browsers name the page that made a request; none of ours needs to.
                raise Denied("requests of web pages are not answered")
            return await handler(request)
        except CubecacheError as error:
            return problem(error, request=request.get(REQUEST_ID))
        except web.HTTPException as error:
            return http_problem(request, error)
        except Exception as error:
            logger.exception("%s %s failed", request.method, request.path)
            told = CubecacheError(
                f"internal error: {type(error).__name__}", remedy="see the daemon's log"
            )
            return problem(told, request=request.get(REQUEST_ID))

    async def body(self, request: web.Request) -> bytes:
        """A JSON body, within its limits of size and time."""
        if request.content_type != "application/json":
            raise web.HTTPUnsupportedMediaType(reason="the body must be application/json")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout(reason="the body did not come in time") from None

    async def once(
        self, request: web.Request, caller: Caller, raw: bytes, work: Handler
    ) -> web.StreamResponse:
        """The work's answer; with an Idempotency-Key, the first answer to that key again (I4)."""
        key = request.headers.get("Idempotency-Key")
        if key is None:
            return await work(request)
        if not _KEY.fullmatch(key):
            raise UsageError("Idempotency-Key is not 1 to 128 letters, digits, `_`, `.` or `-`")
        place = (caller.name, caller.owner, request.method, request.path, key)
        digest = hashlib.sha256(raw).digest()
        kept = self._answers.get(place)
        if kept is not None:
            first = await asyncio.shield(kept)
            if first.digest != digest:
                raise Rejected(f"Idempotency-Key {key} came with another body before")
            return first.response()
        kept = self._answers[place] = asyncio.get_running_loop().create_future()
        try:
            answer = await work(request)
        except CubecacheError as error:
            answer = problem(error, request=request.get(REQUEST_ID))
        except BaseException:
            del self._answers[place]
            kept.set_exception(Busy(f"the request with Idempotency-Key {key} was cut short"))
            kept.exception()  # nobody may be waiting for it
            raise
        assert isinstance(answer, web.Response)
        kept.set_result(_Kept(digest, answer))
        if answer.status >= 500:  # may be another answer next time
            del self._answers[place]
        while len(self._answers) > KEPT_ANSWERS:
            self._answers.popitem(last=False)
        return answer

    async def watch(self, server: web.Server) -> None:
        """Closes connections that send no whole request for a while, and those over the limit.

        Runs until cancelled. aiohttp's own keep-alive limit does not cover a first request whose
        headers never end (I12).
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now, connections = loop.time(), server.connections
            idle = [item for item in connections if item not in self._serving]
            self._seen = {item: self._seen.get(item, now) for item in connections}
            excess = len(connections) - MAX_CONNECTIONS
            for number, item in enumerate(sorted(idle, key=lambda item: self._seen[item])):
                if number < excess or now - self._seen[item] > IDLE_SECONDS:
                    with contextlib.suppress(OSError):
                        item.force_close()


class _Kept:
    """An answer that can be given again."""

    def __init__(self, digest: bytes, answer: web.Response) -> None:
        self.digest = digest
        self._status = answer.status
        self._body = answer.body
        self._kind = answer.content_type

    def response(self) -> web.Response:
        return web.Response(status=self._status, body=self._body, content_type=self._kind)
