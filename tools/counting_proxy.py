"""A reverse proxy before an HTTP or S3 store that counts requests and bytes, and can be slow.

    counting_proxy.py --upstream http://127.0.0.1:9000 [--port 0] [--stats-port 0]
                      [--first-byte-ms N] [--bytes-per-second N]

Prints one JSON object with its two addresses when it listens. `GET /` on the stats address answers
the counters, `POST /reset` sets them to zero. Host and signature pass through unchanged, so URLs
are signed for the proxy's address. A signal ends it at once, open connections included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from dataclasses import asdict, dataclass, field

import aiohttp
from aiohttp import web
from yarl import URL

_PIECE = 64 * 1024
# Headers that belong to one connection (RFC 9110, 7.6.1), and Expect, which our server answered.
_HOP_BY_HOP = frozenset(
    {"connection", "expect", "keep-alive", "proxy-connection", "te", "trailer", "upgrade"}
    | {"transfer-encoding"}
)


@dataclass
class Count:
    """What one class of requests cost: `bytes` counts response bodies towards the client."""

    requests: int = 0
    bytes: int = 0
    errors: int = 0


@dataclass
class Counters:
    """Ranged GETs, GETs of whole objects, and all else (listings, heads, writes, deletes)."""

    ranges: Count = field(default_factory=Count)
    objects: Count = field(default_factory=Count)
    control: Count = field(default_factory=Count)

    def of(self, request: web.Request) -> Count:
        """The counter that `request` belongs to."""
        if request.method == "GET" and "Range" in request.headers:
            return self.ranges
        listing = {"list-type", "prefix", "delimiter", "location", "uploads"} & set(request.query)
        # An S3 path is /bucket/key: what has no key is a question about the bucket.
        has_key = "/" in request.path.strip("/")
        if request.method == "GET" and has_key and not listing:
            return self.objects
        return self.control


class Shaper:
    """Delays each first byte and spreads all bytes over one bandwidth; zeros mean unlimited."""

    def __init__(self, first_byte_seconds: float, bytes_per_second: int) -> None:
        self._first_byte_seconds = first_byte_seconds
        self._bytes_per_second = bytes_per_second
        self._free_at = 0.0

    async def first_byte(self) -> None:
        """Waits before the first byte of a response."""
        if self._first_byte_seconds:
            await asyncio.sleep(self._first_byte_seconds)

    async def send(self, length: int) -> None:
        """Waits until `length` more bytes may pass."""
        if not self._bytes_per_second:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + length / self._bytes_per_second
        await asyncio.sleep(self._free_at - now)


class CountingProxy:
    """Forwards every request to `upstream` and counts it."""

    def __init__(self, upstream: URL, shaper: Shaper, session: aiohttp.ClientSession) -> None:
        self._upstream = upstream
        self._shaper = shaper
        self._session = session
        self.counters = Counters()

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Answers what the upstream answers, or 502 where it does not."""
        count = self.counters.of(request)
        count.requests += 1
        # The raw target, for a signature covers its exact escapes.
        url = URL(f"{self._upstream}{request.raw_path}", encoded=True)
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP]
        try:
            async with self._session.request(
                request.method,
                url,
                headers=headers,
                data=request.content if request.can_read_body else None,
                allow_redirects=False,
            ) as answer:
                return await self._relay(request, answer, count)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            count.errors += 1
            if request.transport is None or request.transport.is_closing():
                raise
            return web.Response(status=502, text=f"upstream: {type(error).__name__}\n")

    async def _relay(
        self, request: web.Request, answer: aiohttp.ClientResponse, count: Count
    ) -> web.StreamResponse:
        if answer.status >= 400:
            count.errors += 1
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                response.headers.add(name, value)
        await self._shaper.first_byte()
        await response.prepare(request)
        async for piece in answer.content.iter_chunked(_PIECE):
            await self._shaper.send(len(piece))
            await response.write(piece)
            count.bytes += len(piece)
        await response.write_eof()
        return response

    async def stats(self, _request: web.Request) -> web.Response:
        """The counters as JSON."""
        return web.json_response(asdict(self.counters))

    async def reset(self, _request: web.Request) -> web.Response:
        """Sets the counters to zero and answers what they were."""
        before = asdict(self.counters)
        self.counters = Counters()
        return web.json_response(before)


async def _listen(stack: contextlib.AsyncExitStack, app: web.Application, port: int) -> str:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0, auto_decompress=False)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


async def serve(upstream: str, port: int, stats_port: int, shaper: Shaper) -> None:
    """Runs until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                auto_decompress=False,
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120),
                skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
            )
        )
        proxy = CountingProxy(URL(upstream.rstrip("/")), shaper, session)
        front = web.Application(client_max_size=0)
        front.router.add_route("*", "/{path:.*}", proxy.forward)
        back = web.Application()
        back.router.add_get("/", proxy.stats)
        back.router.add_post("/reset", proxy.reset)
        addresses = {
            "proxy": await _listen(stack, front, port),
            "stats": await _listen(stack, back, stats_port),
        }
        print(json.dumps(addresses), flush=True)
        await ended.wait()


def main() -> int:
    """Parses the arguments and serves; returns the exit code."""
    parser = argparse.ArgumentParser(description="Count what is fetched from an HTTP or S3 store.")
    parser.add_argument("--upstream", required=True, help="http://HOST:PORT of the store")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--stats-port", type=int, default=0)
    parser.add_argument("--first-byte-ms", type=float, default=0.0)
    parser.add_argument("--bytes-per-second", type=int, default=0)
    chosen = parser.parse_args()
    shaper = Shaper(chosen.first_byte_ms / 1000, chosen.bytes_per_second)
    asyncio.run(serve(chosen.upstream, chosen.port, chosen.stats_port, shaper))
    return 0


if __name__ == "__main__":
    sys.exit(main())
