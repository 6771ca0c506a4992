"""Errors as problem documents (RFC 9457), and the one table of HTTP statuses."""

from __future__ import annotations

import math
from typing import Any

from aiohttp import web

from imagecache.daemon.access import Unauthenticated
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
from preload.jobs import QueueFull

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)

# The first row that matches decides.
HTTP_STATUSES: tuple[tuple[type[CubecacheError], int], ...] = (
    (Unauthenticated, 401),
    (UsageError, 400),
    (LimitExceeded, 413),
    (Rejected, 422),
    (NotFound, 404),
    (Denied, 403),
    (QueueFull, 429),
    (Busy, 409),
    (NoSpace, 507),
    (Unsupported, 501),
    (Unavailable, 503),
    (Corrupt, 502),
    (CubecacheError, 500),
)


def status_of(error: CubecacheError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status in HTTP_STATUSES if isinstance(error, kind))


def problem(
    error: CubecacheError, status: int | None = None, *, request: str | None = None
) -> web.Response:
    """An error as a problem document with the error's kind and remedy, and the request's id."""
    status = status or status_of(error)
    record = as_record(error)
    body: dict[str, Any] = {"type": "about:blank", "title": record["kind"], "status": status}
    body |= record | {"detail": record["message"]}
    if request:
        body["request"] = request
    answer = web.json_response(body, status=status, content_type="application/problem+json")
    if status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, QueueFull):
        answer.headers["Retry-After"] = str(math.ceil(error.retry_seconds))
    return answer


def http_problem(request: web.Request, error: web.HTTPException) -> web.Response:
    """What aiohttp itself refused (no route, wrong method, too large), as a problem document."""
    kinds: dict[int, type[CubecacheError]] = {404: NotFound, 413: LimitExceeded}
    kind = kinds.get(error.status, UsageError)
    told = kind(f"{request.method} {request.path[:200]}: {error.reason}")
    answer = problem(told, error.status, request=request.get(REQUEST_ID))
    if "Allow" in error.headers:
        answer.headers["Allow"] = error.headers["Allow"]
    return answer
