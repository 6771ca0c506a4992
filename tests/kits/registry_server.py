"""A scripted HTTP/1.1 server on a real socket, as hostile as a test wants it to be.

Routes are functions from a `Request` to a `Reply`, or to None after they have used the raw
writer themselves. Nothing of the client under test is used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> str:
        return urlsplit(self.target).query

    def start_of_range(self) -> int | None:
        text = self.headers.get("range", "")
        return int(text[6:].split("-")[0]) if text.startswith("bytes=") else None

    async def raw(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None  # a Content-Length other than the body's own
    chunked: bool = False


Handler = Callable[[Request], "Reply | Awaitable[Reply | None] | None"]


class ScriptedServer:
    """`routes` maps a path, or a path ending in `*`, to its handler; `seen` lists all requests."""

    def __init__(self, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> None:
        self.routes: dict[str, Handler] = {}
        self.seen: list[Request] = []
        self.connections = 0
        self._tls = tls
        self._address = address
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self) -> ScriptedServer:
        self._server = await asyncio.start_server(self._serve, self._address, 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def count(self, prefix: str) -> int:
        return sum(request.path.startswith(prefix) for request in self.seen)

    def add_image(self, image, repository: str = "app", tag: str = "v1") -> None:
        """Serve an image (`kits.oci_images.Image`) as a plain registry would."""
        for digest, body in image.blobs.items():
            self.routes[f"/v2/{repository}/blobs/{digest}"] = serve_blob(body)
        for digest, (body, media_type) in image.manifests.items():
            self.routes[f"/v2/{repository}/manifests/{digest}"] = serve_manifest(body, media_type)
        body, media_type = image.manifests[image.digest]
        self.routes[f"/v2/{repository}/manifests/{tag}"] = serve_manifest(body, media_type)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await writer.wait_closed()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, content = line.partition(":")
            headers[name.lower()] = content.strip()
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        request = Request(method, target, headers, body, writer)
        self.seen.append(request)
        handler = self._route(request.path)
        reply = handler(request) if handler else Reply(404, b'{"errors":[]}')
        if asyncio.iscoroutine(reply):
            reply = await reply
        if reply is None:
            return False
        await write_reply(writer, reply)
        return True

    def _route(self, path: str) -> Handler | None:
        if path in self.routes:
            return self.routes[path]
        for pattern, handler in self.routes.items():
            if pattern.endswith("*") and path.startswith(pattern[:-1]):
                return handler
        return None


async def write_reply(writer: asyncio.StreamWriter, reply: Reply) -> None:
    headers = dict(reply.headers)
    if reply.chunked:
        headers["Transfer-Encoding"] = "chunked"
    else:
        length = len(reply.body) if reply.length is None else reply.length
        headers["Content-Length"] = str(length)
    lines = "".join(f"{name}: {content}\r\n" for name, content in headers.items())
    writer.write(f"HTTP/1.1 {reply.status} X\r\n{lines}\r\n".encode("latin-1"))
    if reply.chunked:
        for start in range(0, len(reply.body), 7919):
            piece = reply.body[start : start + 7919]
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
    else:
        writer.write(reply.body)
    await writer.drain()


def serve_manifest(body: bytes, media_type: str, **headers: str) -> Handler:
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    base = {"Content-Type": media_type, "Docker-Content-Digest": digest}
    return lambda request: Reply(
        200, body, base | {k.replace("_", "-"): v for k, v in headers.items()}
    )


def ranged(body: bytes, start: int | None, etag: str = '"e"') -> Reply:
    """What a correct origin answers to a GET with or without a range."""
    if start is None:
        return Reply(200, body, {"ETag": etag, "Accept-Ranges": "bytes"})
    if start >= len(body):
        return Reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
    content_range = f"bytes {start}-{len(body) - 1}/{len(body)}"
    return Reply(206, body[start:], {"ETag": etag, "Content-Range": content_range})


def serve_blob(body: bytes) -> Handler:
    return lambda request: ranged(body, request.start_of_range())
