"""A client of Firecracker's API socket: HTTP over a unix socket, each call with a deadline.

204 means done; any other answer has `fault_message`. Source: its swagger file (1.17.0-dev).
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

import aiohttp

from cube.errors import BootFailed
from cube.records import printable
from cube.vm.firecracker_config import Request

_ANSWER_LIMIT: Final = 64 * 1024
_FAULT_LIMIT: Final = 600
_POLL_SECONDS: Final = 0.005


class FirecrackerApi:
    """One machine's API. Use as an async context manager."""

    def __init__(self, socket: Path, *, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(path=str(socket)),
            timeout=aiohttp.ClientTimeout(total=seconds),
        )

    async def __aenter__(self) -> FirecrackerApi:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ready(self, *, seconds: float) -> str:
        """Firecracker's version, once it answers; raises BootFailed."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        return await self._version()
                    except (aiohttp.ClientConnectorError, FileNotFoundError):
                        await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            raise BootFailed(
                f"Firecracker's API did not answer within {seconds:g} seconds"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise BootFailed(f"Firecracker's API does not answer: {error}") from error

    async def put(self, request: Request) -> None:
        """Makes the call; raises BootFailed naming the object, its fields and the refusal."""
        told = f"{request.what} (PUT {request.path}: {', '.join(request.body)})"
        try:
            async with self._session.put(
                f"http://localhost{request.path}", json=request.body
            ) as response:
                if response.status == 204:
                    return
                raw = await response.content.read(_ANSWER_LIMIT)
                status = response.status
        except TimeoutError as error:
            raise BootFailed(
                f"Firecracker did not answer about {told} within {self._seconds:g} seconds"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise BootFailed(f"Firecracker hung up on {told}: {error}") from error
        raise BootFailed(f"Firecracker refuses {told}: {status} {_fault(raw)}")

    async def _version(self) -> str:
        async with self._session.get("http://localhost/version") as response:
            raw = await response.content.read(_ANSWER_LIMIT)
        try:
            return str(json.loads(raw)["firecracker_version"])[:60]
        except (ValueError, KeyError, TypeError):
            return "unknown"


def _fault(raw: bytes) -> str:
    try:
        fault = json.loads(raw)["fault_message"]
    except (ValueError, KeyError, TypeError):
        fault = raw.decode("utf-8", "replace")
    return printable(str(fault).encode())[:_FAULT_LIMIT] or "without a reason"
