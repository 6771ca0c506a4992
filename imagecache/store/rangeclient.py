"""The one range client: plain HTTP GETs of exact ranges, from the origin or from a shared tier.

One call is one attempt. Bodies come back whole and of the asked length or not at all; what the
bytes mean, and whether they are the right ones, is the caller's to verify. Checksum and ETag
headers are ignored: servers send whole-object ones with a part (catalogue G4, G9). Redirects are
not followed.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import aiohttp
from yarl import URL

from imagecache.errors import CubecacheError, Denied, NotFound, Unavailable
from imagecache.store.base import (
    OriginProtocol,
    Priority,
    RangePastEnd,
    Throttled,
    check_key,
    check_range,
)
from imagecache.store.policy import parse_retry_after

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
_ERROR_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,64})</Code>")
_ERROR_BYTES = 8192
_MAX_SKIP_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 22
_HEADERS = {"Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Deadlines of one attempt, in seconds: its total grows with the length by `bytes_per_s`."""

    connect_s: float = 5.0
    stall_s: float = 10.0
    total_s: float = 15.0
    bytes_per_s: float = 256 << 10


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a 400, 401 or 403 said: its S3 error code if any, and the server's Date header."""

    status: int
    code: str
    date: str


class UrlSource(Protocol):
    """Where a key is to be read from."""

    def known(self, key: str) -> URL | None:
        """The URL when it is at hand: the fast path, on the loop."""
        ...

    async def find(self, key: str) -> URL:
        """The URL, made now."""
        ...

    async def refused(self, key: str, refusal: Refusal) -> bool:
        """Forget the URL; True when a new one is worth one more attempt."""
        ...


class HttpRangeReader:
    """Ranges by HTTP/1.1 keep-alive connections of its own; bounded by the wrappers above it."""

    def __init__(
        self,
        urls: UrlSource,
        limits: HttpLimits,
        *,
        name: str,
        tls: ssl.SSLContext | None = None,
        proxy: str | None = None,
    ) -> None:
        self._urls = urls
        self._limits = limits
        self._name = name
        self._tls = tls
        self._proxy = proxy
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def read(self, key: str, offset: int, length: int, *, priority: Priority) -> bytes:  # noqa: ARG002 - the protocol's argument; the wrappers above have ordered us
        """Exactly `length` bytes, by one attempt (two where the first URL was no longer good)."""
        check_key(key)
        check_range(key, offset, length)
        url = self._urls.known(key) or await self._urls.find(key)
        refusal = await self._attempt(url, key, offset, length)
        if isinstance(refusal, Refusal) and await self._urls.refused(key, refusal):
            url = await self._urls.find(key)
            refusal = await self._attempt(url, key, offset, length)
        if isinstance(refusal, Refusal):
            raise Denied(
                f"{self._name} refused {key} ({refusal.status} {refusal.code})".replace(" )", ")"),
                remedy="check the credentials and the permission to get objects",
            )
        return refusal

    def condemn(self, key: str) -> None:
        """Nothing stands between this reader and its server."""

    async def close(self) -> None:
        """End the connections; later reads raise Unavailable."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._closed:
            raise Unavailable(f"{self._name} is closed")
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=30, ssl=self._tls or True)
            self._session = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                read_bufsize=_BUFFER_BYTES,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept"),
                headers=_HEADERS,
            )
        return self._session

    async def _attempt(self, url: URL, key: str, offset: int, length: int) -> bytes | Refusal:
        async with self._asked(url, key, offset, length) as answer:
            if isinstance(answer, Refusal):
                return answer
            response, more = answer
            return await _read_body(response, key, length, more=more)

    async def stream(self, key: str, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Pieces of the range as they arrive, by one attempt: `imagecache.store.stream`."""
        check_key(key)
        check_range(key, offset, length)
        url = self._urls.known(key) or await self._urls.find(key)
        async with self._asked(url, key, offset, length) as answer:
            if isinstance(answer, Refusal):
                await self._urls.refused(key, answer)
                raise Denied(f"{self._name} refused to stream {key} ({answer.status})")
            response, more = answer
            while length:
                piece = await response.content.readany()
                if not piece:
                    raise OriginProtocol(f"{key} came {length} bytes short")
                piece = piece[:length]
                length -= len(piece)
                yield piece
            if more:
                response.close()

    @asynccontextmanager
    async def _asked(
        self, url: URL, key: str, offset: int, length: int
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, bool] | Refusal]:
        """A checked response at the range's first byte, and whether more than the range follows."""
        session = self._open()
        limits = self._limits
        timeout = aiohttp.ClientTimeout(
            total=limits.total_s + length / limits.bytes_per_s,
            sock_connect=limits.connect_s,
            sock_read=limits.stall_s,
        )
        try:
            async with session.get(
                url,
                headers={"Range": f"bytes={offset}-{offset + length - 1}"},
                allow_redirects=False,
                timeout=timeout,
                proxy=self._proxy,
            ) as response:
                # Some servers (rclone) send a right part and its Content-Range under a 200.
                if response.status == 206 or _says_part(response):
                    _check_part(response, key, offset, length)
                    yield response, False
                elif response.status == 200:
                    _check_whole(response, key, offset, length)
                    await _skip(response, key, offset)
                    yield response, True
                else:
                    yield await self._refusal(response, key)
        except CubecacheError:
            raise
        except TimeoutError as error:
            raise Unavailable(
                f"{self._name} was too slow for {offset}+{length} of {key}"
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = str(error)[:200] or type(error).__name__
            raise Unavailable(f"{self._name} broke off {key}: {_without_query(reason)}") from error

    async def _refusal(self, response: aiohttp.ClientResponse, key: str) -> Refusal:
        """The Refusal of a 400, 401 or 403; every other status is raised as its error."""
        status = response.status
        body = await response.content.read(_ERROR_BYTES)
        matched = _ERROR_CODE.search(body)
        code = matched[1].decode() if matched else ""
        what = f"{self._name} answered {status} {code} for {key}".replace("  ", " ")
        if status in (429, 503) or code == "SlowDown":
            retry_after = parse_retry_after(response.headers.get("Retry-After"), time.time())
            raise Throttled(what, retry_after=retry_after)
        if status in (404, 410):
            if code == "NoSuchBucket":
                raise Unavailable(f"{self._name} has no such bucket", remedy="create it")
            raise NotFound(f"object {key} is not in {self._name}")
        if status == 416:
            raise RangePastEnd(f"the range runs past {key}'s end ({self._name})")
        if status in (400, 401, 403):
            return Refusal(status, code, response.headers.get("Date", ""))
        if 300 <= status < 400:
            raise Unavailable(what, remedy="redirects are not followed: name the right endpoint")
        raise Unavailable(what)


def _check_part(response: aiohttp.ClientResponse, key: str, offset: int, length: int) -> None:
    """Catalogue A16, G3: a part must be of exactly the bytes that were asked for."""
    matched = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if matched is None:
        raise OriginProtocol(f"a part of {key} carries no readable Content-Range")
    first, last = int(matched[1]), int(matched[2])
    if first == offset and last < offset + length - 1 and matched[3] == str(last + 1):
        raise RangePastEnd(f"range {offset}+{length} runs past {key}'s end at {last + 1}")
    if (first, last) != (offset, offset + length - 1):
        raise OriginProtocol(f"asked for {offset}+{length} of {key}, got {first}-{last}")
    unproven = response.status != 206 and response.content_length is None
    if unproven or response.content_length not in (None, length):
        raise OriginProtocol(f"a part of {key} has a length of {response.content_length}")
    _check_coding(response, key)


def _says_part(response: aiohttp.ClientResponse) -> bool:
    return response.status == 200 and "Content-Range" in response.headers


def _check_whole(response: aiohttp.ClientResponse, key: str, offset: int, length: int) -> None:
    """Catalogue G2: a 200 is the whole object, usable while its length proves what a slice is."""
    total = response.content_length
    if total is None:
        raise OriginProtocol(f"a 200 for a range of {key} does not prove what it holds")
    if offset + length > total:
        raise RangePastEnd(f"range {offset}+{length} runs past {key}'s end at {total}")
    if offset > _MAX_SKIP_BYTES:
        raise OriginProtocol(f"ranges of {key} are ignored, and {offset} is too far to skip")
    _check_coding(response, key)


def _check_coding(response: aiohttp.ClientResponse, key: str) -> None:
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise OriginProtocol(f"{key} came with a content coding that nobody asked for")


async def _skip(response: aiohttp.ClientResponse, key: str, length: int) -> None:
    while length > 0:
        piece = await response.content.read(min(length, _BUFFER_BYTES))
        if not piece:
            raise OriginProtocol(f"{key} came {length} bytes short")
        length -= len(piece)


async def _read_body(
    response: aiohttp.ClientResponse, key: str, length: int, *, more: bool
) -> bytes:
    content = response.content
    try:
        body = await content.readexactly(length)
    except asyncio.IncompleteReadError as error:
        raise OriginProtocol(f"{key} came {length - len(error.partial)} bytes short") from error
    if more:
        response.close()  # the rest of a whole object is not worth its bytes
    elif not content.at_eof() and await content.read(1):
        raise OriginProtocol(f"{key} came with more bytes than it declared")
    return body


def _without_query(text: str) -> str:
    """No signature may reach a log."""
    return re.sub(r"\?[^\s'\"]*", "?...", text)
