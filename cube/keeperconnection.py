"""The client's end of the keeper's interface; starts a keeper where none answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp

from cube.podsession import PodSession
from imagecache.errors import CubecacheError, Unavailable, from_record
from imagecache.session import Settings

CALL_SECONDS: Final = 120.0
_START_SECONDS: Final = 60.0
_ANSWER_LIMIT: Final = 64 * 1024 * 1024
_LINE_LIMIT: Final = 4 * 1024 * 1024


class KeeperConnection:
    """Calls of one state directory's keeper. Use as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    @property
    def _socket(self) -> Path:
        return self._settings.state_dir / "pods.sock"

    async def __aenter__(self) -> KeeperConnection:
        connector = aiohttp.UnixConnector(path=str(self._socket), limit=0)
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=_LINE_LIMIT
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def revive(self) -> None:
        """Starts the keeper where none answers and there are pods on record."""
        if await asyncio.to_thread((self._settings.state_dir / "pods.sqlite").exists):
            await self.ensure()

    async def ensure(self) -> None:
        """Starts the keeper where none answers; it starts the daemon once it needs one."""
        if await self._answers():
            return
        process = await asyncio.to_thread(_spawn_keeper, self._settings)
        deadline = time.monotonic() + _START_SECONDS
        while not await self._answers():
            # Another starter's keeper may be the one that answers.
            if process.poll() is not None and not await self._appears():
                raise Unavailable(
                    f"the keeper of pods could not start (exit status {process.returncode})",
                    remedy=f"see {self._settings.state_dir / 'pods.log'}",
                )
            if time.monotonic() > deadline:
                process.kill()
                raise Unavailable("the keeper of pods was not ready in time")
            await asyncio.sleep(0.05)

    async def _appears(self) -> bool:
        for _ in range(100):
            if await self._answers():
                return True
            await asyncio.sleep(0.05)
        return False

    async def _answers(self) -> bool:
        try:
            await self.call("GET", "/healthz", seconds=5)
        except CubecacheError:
            return False
        return True

    @property
    def open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise Unavailable("this Cube is not open", remedy="async with Cube() as cube: ...")
        return self._session

    async def call(
        self,
        method: str,
        path: str,
        body: str | None = None,
        *,
        seconds: float | None = CALL_SECONDS,
    ) -> Any:
        try:
            async with self.open.request(
                method,
                f"http://pods{path}",
                data=body,
                timeout=aiohttp.ClientTimeout(total=seconds),
            ) as response:
                raw = await response.content.read(_ANSWER_LIMIT)
                status = response.status
                while not response.content.at_eof() and len(raw) < _ANSWER_LIMIT:
                    raw += await response.content.read(_ANSWER_LIMIT)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._absent() from error
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise Unavailable(f"the keeper answered {raw[:200]!r}") from error
        if status >= 400:
            raise from_record(answer)
        return answer

    @contextlib.asynccontextmanager
    async def lines_of(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """An answer that has no end, line by line; Unavailable when the keeper ends."""
        timeout = aiohttp.ClientTimeout(total=None)
        try:
            async with self.open.get(f"http://pods{path}", timeout=timeout) as response:
                if response.status >= 400:
                    raise from_record(await response.json())
                yield self._lines(response.content)
        except (aiohttp.ClientError, OSError) as error:
            raise self._absent() from error

    async def _lines(self, content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
        while (line := await content.readline()).endswith(b"\n"):
            yield line
        raise self._absent()

    @contextlib.asynccontextmanager
    async def socket_to(self, path: str) -> AsyncIterator[PodSession]:
        try:
            socket = await self.open.ws_connect(f"http://pods{path}", max_msg_size=_LINE_LIMIT)
        except aiohttp.WSServerHandshakeError as error:
            # The reason is in the answer's body, which the handshake does not keep.
            await self.call("GET", path.partition("?")[0].rpartition("/")[0])
            raise Unavailable("the pod has no running machine") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._absent() from error
        session = PodSession(socket)
        try:
            yield session
        finally:
            await session.close()

    def _absent(self) -> Unavailable:
        return Unavailable(
            f"no keeper of pods answers on {self._socket}", remedy="cubecache pod run"
        )


def _spawn_keeper(settings: Settings) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cube.keeper", "--state-dir", str(settings.state_dir)]
    command += ["--store", settings.store_url, "--realm", settings.realm]
    if settings.config_file:
        command += ["--config", str(settings.config_file)]
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (settings.state_dir / "pods.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
