"""Firecracker's way to a guest's port, against a device that answers as its document says."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from cube.channel.vsock import connect_vsock
from imagecache.errors import Rejected, Unavailable

pytestmark = pytest.mark.quick


@contextlib.asynccontextmanager
async def device(path: Path, *answers: bytes):
    """Answers one connection after the other; b"" closes it as if nobody listened."""
    waiting, asked, serving = list(answers), [], []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        asked.append(await reader.readline())
        if answer := waiting.pop(0) if waiting else b"":
            writer.write(answer)
            await writer.drain()
            await reader.read()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(serve, str(path))
    async with server:
        yield asked
        await asyncio.wait_for(asyncio.gather(*serving), 60)


async def test_connection_comes_once_the_guest_listens(tmp_path):
    path = tmp_path / "v.sock"
    async with device(path, b"", b"", b"OK 1073741824\nhello") as asked:
        reader, writer = await connect_vsock(path, seconds=60)
        assert await reader.readexactly(5) == b"hello"
        assert asked == [b"CONNECT 1024\n"] * 3
        writer.close()


@pytest.mark.parametrize("answer", [b"NO\n", b"OK\n", b"x" * 200, b"OK 1 2\n"])
async def test_other_answers_are_rejected(tmp_path, answer):
    path = tmp_path / "v.sock"
    async with device(path, answer):
        with pytest.raises(Rejected, match="no vsock device"):
            await connect_vsock(path, seconds=60)


async def test_guest_that_never_listens_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="did not listen on vsock port 7"):
        await connect_vsock(tmp_path / "nowhere", port=7, seconds=0.1)
