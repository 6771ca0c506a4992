"""An HTTP server that answers as a test scripts it, and records what it was asked."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web
from yarl import URL

from imagecache.store.rangeclient import HttpLimits, Refusal

Handler = Callable[[web.BaseRequest, bytes], Awaitable[web.StreamResponse]]


@dataclass
class Scripted:
    """`answer` is called per request with its whole body; `seen` are (method, path, headers)."""

    answer: Handler
    base: str = ""
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def count(self, method: str) -> int:
        return sum(1 for entry in self.seen if entry[0] == method)


@asynccontextmanager
async def scripted(answer: Handler) -> AsyncIterator[Scripted]:
    """Serve on loopback until the end of the block."""
    server = Scripted(answer)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        headers = {key.lower(): value for key, value in request.headers.items()}
        server.seen.append((request.method, request.path_qs, headers))
        body = await request.content.read()  # request.read() has a limit
        return await server.answer(request, body)

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def s3_error(status: int, code: str, **headers: str) -> web.Response:
    """An S3 error document."""
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>scripted</Message></Error>"
    return web.Response(
        status=status, body=text.encode(), content_type="application/xml", headers=headers
    )


def asked_range(request: web.BaseRequest) -> tuple[int, int]:
    """(first, last) of the request's Range header."""
    first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
    return int(first), int(last)


def part(body: bytes, first: int, last: int, **headers: str) -> web.Response:
    """A right 206."""
    piece = body[first : last + 1]
    content_range = f"bytes {first}-{first + len(piece) - 1}/{len(body)}"
    return web.Response(status=206, body=piece, headers={"Content-Range": content_range, **headers})


async def broken_off(
    request: web.BaseRequest, body: bytes, first: int, last: int, sent: int
) -> web.StreamResponse:
    """A right 206 head, `sent` bytes of its body, and a reset."""
    response = web.StreamResponse(
        status=206,
        headers={
            "Content-Range": f"bytes {first}-{last}/{len(body)}",
            "Content-Length": str(last - first + 1),
        },
    )
    await response.prepare(request)
    await response.write(body[first : first + sent])
    assert request.transport is not None
    request.transport.abort()
    return response


class FixedUrls:
    """A UrlSource of one server, with nothing to sign."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.refusals: list[Refusal] = []

    def known(self, key: str) -> URL | None:
        return URL(f"{self.base}/bucket/{key}?sig=1", encoded=True)

    async def find(self, key: str) -> URL:
        return URL(f"{self.base}/bucket/{key}?sig=1", encoded=True)

    async def refused(self, key: str, refusal: Refusal) -> bool:
        self.refusals.append(refusal)
        return True


QUICK = HttpLimits(connect_s=1.0, stall_s=0.3, total_s=0.5, bytes_per_s=64 << 20)

FAULTS = ("500", "503", "404", "200", "short", "reset", "chunked-short", "wrong-range", "no-range",
          "html", "stall", "redirect", "coding", "extra", "416", "flip")  # fmt: skip


class FaultyOrigin:
    """Serves ranges of one object; a share of the answers is faulty, of kinds drawn by a seed."""

    def __init__(
        self, body: bytes, share: float, seed: int, faults: Iterable[str] = FAULTS
    ) -> None:
        self.body = body
        self.share = share
        self.dice = random.Random(seed)
        self.faults = tuple(faults)
        self.drawn: dict[str, int] = {}

    async def __call__(self, request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        first, last = asked_range(request)
        if self.dice.random() >= self.share:
            return part(self.body, first, last)
        fault = self.dice.choice(self.faults)
        self.drawn[fault] = self.drawn.get(fault, 0) + 1
        return await self.faulty(request, fault, first, last)

    async def faulty(
        self, request: web.BaseRequest, fault: str, first: int, last: int
    ) -> web.StreamResponse:
        body, length = self.body, last - first + 1
        match fault:
            case "500":
                return s3_error(500, "InternalError")
            case "503":
                return s3_error(503, "SlowDown")
            case "404":
                return s3_error(404, "NoSuchKey")
            case "416":
                return s3_error(416, "InvalidRange")
            case "200":
                return web.Response(body=body)
            case "short":
                return await broken_off(request, body, first, last, length // 2)
            case "reset":
                return await broken_off(request, body, first, last, 0)
            case "chunked-short":
                response = web.StreamResponse(
                    status=206, headers={"Content-Range": f"bytes {first}-{last}/{len(body)}"}
                )
                response.enable_chunked_encoding()
                await response.prepare(request)
                await response.write(body[first:last])
                await response.write_eof()
                return response
            case "extra":
                return web.Response(
                    status=206,
                    body=body[first : last + 2] + b"x",
                    headers={"Content-Range": f"bytes {first}-{last}/{len(body)}"},
                )
            case "wrong-range":
                return part(body, first + 1, last)
            case "no-range":
                return web.Response(status=206, body=body[first : last + 1])
            case "html":
                return web.Response(status=200, text="<html>captive portal</html>")
            case "stall":
                await asyncio.sleep(1.0)
                return part(body, first, last)
            case "redirect":
                return web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"})
            case "coding":
                return part(body, first, last, **{"Content-Encoding": "gzip"})
            case "flip":
                wrong = bytearray(body)
                wrong[first] ^= 1
                return part(bytes(wrong), first, last)
        raise AssertionError(fault)


def digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()
