"""The control API against clients that are no HTTP client: raw bytes on its socket."""

import asyncio

import aiohttp
import pytest

from imagecache.daemon import gate
from imagecache.settings import Settings


async def exchange(where: Settings, *pieces: bytes) -> bytes:
    """What the daemon answers until it closes, or says nothing more for a second."""
    reader, writer = await asyncio.open_unix_connection(str(where.control_socket))
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0)
    answer = b""
    try:
        async with asyncio.timeout(3):
            while piece := await reader.read(65536):
                answer += piece
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return answer


async def closed_by_daemon(where: Settings, sent: bytes) -> bool:
    reader, writer = await asyncio.open_unix_connection(str(where.control_socket))
    writer.write(sent)
    async with asyncio.timeout(30):
        await reader.read()
    writer.close()
    return True


async def alive(where: Settings) -> bool:
    connector = aiohttp.UnixConnector(path=str(where.control_socket))
    async with (
        aiohttp.ClientSession("http://x", connector=connector) as session,
        session.get("/healthz") as answer,
    ):
        return answer.status == 200


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IDLE_SECONDS", "BODY_SECONDS", "SWEEP_SECONDS"):
        monkeypatch.setattr(gate, name, 0.2)


POST = b"POST /v1/preloads HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        POST
        + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n"
        + b"".join(b"X-%d: y\r\n" % n for n in range(10_000))
        + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(600),
        b"\x00" * 4096,
    ],
    ids="cl+te cl+cl te 10k-headers long-header long-path version name tls zeros".split(),
)
async def test_smuggling_and_oversize_are_refused_and_close(daemon: Settings, sent: bytes) -> None:
    """I12: 400 or a closed connection, one answer at most, and the daemon goes on."""
    answer = await exchange(daemon, sent)
    assert answer.count(b"HTTP/1.") <= 1
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert await alive(daemon)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-",
        POST + b"Content-Length: 1000\r\n\r\n{",
        POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["silent", "half a header", "half a body", "half a chunk", "idle after an answer"],
)
async def test_slow_clients_are_closed(impatient: None, daemon: Settings, sent: bytes) -> None:
    """I12: slowloris in every phase; a connection without a whole request ends."""
    assert await closed_by_daemon(daemon, sent)
    assert await alive(daemon)


async def test_chunked_for_ever_ends_at_the_cap(daemon: Settings) -> None:
    """I1: a chunked body has the same limit as any other."""
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer = await exchange(daemon, POST + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40)
    assert b" 413 " in answer.split(b"\r\n", 1)[0]
    assert await alive(daemon)


async def test_compressed_bodies_are_not_expanded(daemon: Settings) -> None:
    """I1: a gzip bomb stays as small as it came."""
    import gzip

    bomb = gzip.compress(bytes(50 << 20))
    head = POST + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    answer = await exchange(daemon, head + bomb)
    assert b" 400 " in answer.split(b"\r\n", 1)[0]


async def test_connections_over_the_limit_make_room(
    monkeypatch: pytest.MonkeyPatch, daemon: Settings
) -> None:
    """I12: many idle connections; the oldest are closed, and the next caller is answered."""
    monkeypatch.setattr(gate, "MAX_CONNECTIONS", 20)
    idle = [await asyncio.open_unix_connection(str(daemon.control_socket)) for _ in range(100)]

    async def ended(reader: asyncio.StreamReader) -> None:
        await reader.read()

    waiting = [asyncio.create_task(ended(reader)) for reader, _ in idle]
    async with asyncio.timeout(30):
        while sum(task.done() for task in waiting) < 80:
            await asyncio.sleep(0.05)
    assert await alive(daemon)
    for _, writer in idle:
        writer.close()
    await asyncio.gather(*waiting)
