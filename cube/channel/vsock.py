"""The channel over Firecracker's vsock: a unix socket that leads to the guest's ports.

Format, from Firecracker's docs/vsock.md: the host connects to the device's `uds_path` and sends
`CONNECT PORT` and a line feed; `OK` and a number on a line come back once the guest has accepted,
and the connection closes where nobody listens. The agent listens when the kernel's command line has
the word `cube.vsock`.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from imagecache.errors import Rejected, Unavailable

AGENT_PORT: Final = 1024
KERNEL_ARGUMENT: Final = "cube.vsock"
_LINE_BYTES: Final = 64
_RETRY_SECONDS: Final = 0.05


async def connect_vsock(
    path: Path, *, port: int = AGENT_PORT, seconds: float = 180.0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the guest's port, as soon as somebody listens there.

    Raises Unavailable after `seconds`, Rejected for an answer that is not Firecracker's.
    """
    try:
        async with asyncio.timeout(seconds):
            while True:
                with contextlib.suppress(OSError):
                    connected = await _attempt(path, port)
                    if connected is not None:
                        return connected
                await asyncio.sleep(_RETRY_SECONDS)
    except TimeoutError as error:
        raise Unavailable(
            f"the machine's agent did not listen on vsock port {port} within {seconds:g} seconds"
        ) from error


async def _attempt(
    path: Path, port: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(b"CONNECT %d\n" % port)
        await writer.drain()
        line = b""
        # Byte by byte: what follows the line is the guest's and stays in the reader.
        while not line.endswith(b"\n"):
            byte = await reader.read(1)
            if not byte:
                writer.close()
                await writer.wait_closed()
                return None
            line += byte
            if len(line) > _LINE_BYTES:
                break
        words = line.split()
        if not line.endswith(b"\n") or len(words) != 2 or words[0] != b"OK":
            raise Rejected(f"{path} answered {line!r}, which is no vsock device's answer")
    except BaseException:
        writer.close()
        raise
    return reader, writer
