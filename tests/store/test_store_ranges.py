"""The range client against every kind of answer, one attempt each."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from kits.store_scripted import (
    QUICK,
    FaultyOrigin,
    FixedUrls,
    Scripted,
    asked_range,
    part,
    s3_error,
    scripted,
)

from imagecache.errors import CubecacheError, Denied, NotFound, Unavailable
from imagecache.store.base import OriginProtocol, Priority, RangePastEnd, Throttled
from imagecache.store.rangeclient import HttpRangeReader

DEMAND = Priority.DEMAND
BODY = random.Random(5).randbytes(50_000)


@pytest.fixture
async def server() -> AsyncIterator[Scripted]:
    async with scripted(FaultyOrigin(BODY, 0.0, 0)) as running:
        yield running


@pytest.fixture
async def reader(server: Scripted) -> AsyncIterator[HttpRangeReader]:
    opened = HttpRangeReader(FixedUrls(server.base), QUICK, name="origin")
    yield opened
    await opened.close()


async def read(reader: HttpRangeReader, offset: int = 100, length: int = 5000) -> bytes:
    return await reader.read("r/pack", offset, length, priority=DEMAND)


async def test_asks_for_the_range_and_nothing_else(
    server: Scripted, reader: HttpRangeReader
) -> None:
    """G5: no If-Range is sent (keys are immutable); no coding, no cookies, no credentials."""
    assert await read(reader) == BODY[100:5100]
    headers = server.seen[0][2]
    assert headers.pop("host") in server.base
    assert headers == {"range": "bytes=100-5099", "accept-encoding": "identity"}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("500", Unavailable),
        ("503", Throttled),
        ("404", NotFound),
        ("416", RangePastEnd),
        ("short", Unavailable),
        ("reset", Unavailable),
        ("chunked-short", OriginProtocol),
        ("extra", OriginProtocol),
        ("wrong-range", OriginProtocol),
        ("no-range", OriginProtocol),
        ("html", RangePastEnd),
        ("stall", Unavailable),
        ("redirect", Unavailable),
        ("coding", OriginProtocol),
    ],
)
async def test_every_fault_is_an_error_and_the_next_read_works(
    server: Scripted, reader: HttpRangeReader, fault: str, error: type[CubecacheError]
) -> None:
    """G1, G3, A16, A18: no answer but the asked bytes is accepted, and none harms the next."""
    server.answer = FaultyOrigin(BODY, 1.0, 1, [fault])
    with pytest.raises(error) as raised:
        await read(reader)
    assert type(raised.value) is error or fault in ("short", "reset")
    assert "sig=" not in str(raised.value)
    server.answer = FaultyOrigin(BODY, 0.0, 1)
    assert await read(reader) == BODY[100:5100]


async def test_a_whole_object_is_sliced(server: Scripted, reader: HttpRangeReader) -> None:
    """G2: a 200 with a length proves where the slice is; the rest is not waited for."""
    server.answer = FaultyOrigin(BODY, 1.0, 1, ["200"])
    for offset, length in [(0, 1), (100, 5000), (49_999, 1), (0, 50_000)]:
        assert await read(reader, offset, length) == BODY[offset : offset + length]
    with pytest.raises(RangePastEnd):
        await read(reader, 49_999, 2)


async def test_a_whole_object_of_unknown_length_is_refused(
    server: Scripted, reader: HttpRangeReader
) -> None:
    """G2: a chunked 200 proves nothing."""

    async def chunked(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(BODY)
        await response.write_eof()
        return response

    server.answer = chunked
    with pytest.raises(OriginProtocol):
        await read(reader)


async def test_a_part_under_a_200(server: Scripted, reader: HttpRangeReader) -> None:
    """G2: rclone sends the right part and its Content-Range under a 200; a wrong one is refused."""
    shift = 0

    async def odd(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        first, last = asked_range(request)
        response = part(BODY, first + shift, last + shift)
        response.set_status(200)
        return response

    server.answer = odd
    assert await read(reader) == BODY[100:5100]
    shift = 1
    with pytest.raises(OriginProtocol):
        await read(reader)


async def test_whole_object_checksums_and_odd_etags_are_ignored(
    server: Scripted, reader: HttpRangeReader
) -> None:
    """G4, G9: whole-object checksums on a part, and a new ETag at each read, mean nothing."""
    count = 0

    async def answer(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        nonlocal count
        count += 1
        first, last = asked_range(request)
        return part(
            BODY,
            first,
            last,
            **{"x-amz-checksum-crc32": "AAAAAA==", "Content-MD5": "wrong", "ETag": f'"{count}-2"'},
        )

    server.answer = answer
    assert await read(reader) == BODY[100:5100]
    assert await read(reader, 0, 10) == BODY[:10]


async def test_retry_after_is_carried(server: Scripted, reader: HttpRangeReader) -> None:
    """G1, A8: Retry-After as a number, as a date, and as nonsense."""
    for text, low, high in [("7", 7, 7), ("Sun, 22 Nov 2099 00:00:00 GMT", 1e8, 1e10)]:

        async def answer(
            request: web.BaseRequest, _: bytes, text: str = text
        ) -> web.StreamResponse:
            return s3_error(503, "SlowDown", **{"Retry-After": text})

        server.answer = answer
        with pytest.raises(Throttled) as raised:
            await read(reader)
        assert raised.value.retry_after is not None and low <= raised.value.retry_after <= high

    async def nonsense(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        return s3_error(429, "TooMany", **{"Retry-After": "soon"})

    server.answer = nonsense
    with pytest.raises(Throttled) as raised:
        await read(reader)
    assert raised.value.retry_after is None


async def test_a_refused_url_is_renewed_once(server: Scripted, reader: HttpRangeReader) -> None:
    """A7, G10: an expired presigned URL is signed again, once; then it is Denied."""
    answers = iter([403, 206, 403, 403])

    async def answer(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        status = next(answers)
        return part(BODY, *asked_range(request)) if status == 206 else s3_error(403, "AccessDenied")

    server.answer = answer
    assert await read(reader) == BODY[100:5100]
    with pytest.raises(Denied, match="r/pack"):
        await read(reader)
    assert len(server.seen) == 4


async def test_a_missing_bucket_is_not_a_missing_object(
    server: Scripted, reader: HttpRangeReader
) -> None:
    """G11: NoSuchBucket is no answer about the object."""

    async def answer(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        return s3_error(404, "NoSuchBucket")

    server.answer = answer
    with pytest.raises(Unavailable, match="no such bucket"):
        await read(reader)


@pytest.mark.parametrize(
    "base", ["http://127.0.0.1:1", "http://nowhere.invalid", "https://127.0.0.1:{port}"]
)
async def test_no_connection(server: Scripted, base: str) -> None:
    """G16: refused connections, names that do not resolve, broken TLS are Unavailable."""
    base = base.replace("{port}", server.base.rpartition(":")[2])
    reader = HttpRangeReader(FixedUrls(base), QUICK, name="origin")
    with pytest.raises(Unavailable):
        await read(reader)
    await reader.close()


async def test_stale_connections_are_replaced(server: Scripted, reader: HttpRangeReader) -> None:
    """G16: a kept connection that the server has dropped costs no error."""

    async def closing(request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        response = part(BODY, *asked_range(request))
        await response.prepare(request)
        await response.write_eof()
        assert request.transport is not None
        request.transport.close()
        return response

    server.answer = closing
    for _ in range(5):
        assert await read(reader) == BODY[100:5100]


async def test_closed(reader: HttpRangeReader) -> None:
    await reader.close()
    with pytest.raises(Unavailable, match="closed"):
        await read(reader)
