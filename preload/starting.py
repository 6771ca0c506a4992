"""Starting and stopping a daemon of a state directory as a child process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

from imagecache.errors import Busy, Unavailable, exit_code
from imagecache.settings import Settings

START_SECONDS = 30.0
BUSY_STATUS = exit_code(Busy(""))


def serve_command(settings: Settings, *, detached: bool) -> list[str]:
    """The command line of a daemon with these settings; one not detached ends with its starter."""
    command = [sys.executable, "-m", "imagecache", "--state-dir", str(settings.state_dir)]
    command += ["--store", settings.store_url]
    if settings.config_file:
        command += ["--config", str(settings.config_file)]
    return [*command, "serve", *([] if detached else ["--until-stdin-closes"])]


async def start_daemon_process(
    settings: Settings,
    answers: Callable[[Settings], Awaitable[bool]],
    *,
    detached: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a daemon and waits until it answers; its log goes to STATE/daemon.log."""
    environment = {**os.environ, "CUBECACHE_REALM": settings.realm}

    def spawn() -> subprocess.Popen[bytes]:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (settings.state_dir / "daemon.log").open("ab") as log:
            return subprocess.Popen(
                serve_command(settings, detached=detached),
                stdin=subprocess.DEVNULL if detached else subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    process = await asyncio.to_thread(spawn)
    try:
        async with asyncio.timeout(START_SECONDS):
            while not await answers(settings):
                if process.poll() == BUSY_STATUS:
                    # A daemon that was told to end still drains and holds the arena's lock.
                    await asyncio.sleep(0.2)
                    process = await asyncio.to_thread(spawn)
                elif process.poll() is not None:
                    raise Unavailable(
                        f"a daemon could not start (exit status {process.returncode})",
                        remedy=f"see {settings.state_dir / 'daemon.log'}",
                    )
                await asyncio.sleep(0.05)
    except BaseException as error:
        await stop_daemon(process)
        if isinstance(error, TimeoutError):
            raise Unavailable(
                f"a daemon was not ready within {START_SECONDS:.0f} seconds",
                remedy=f"see {settings.state_dir / 'daemon.log'}",
            ) from error
        raise
    return process


async def stop_daemon(process: subprocess.Popen[bytes]) -> None:
    """Ends a daemon that `start_daemon` started: TERM, then KILL after ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.to_thread(process.wait, 10)
    except subprocess.TimeoutExpired:
        process.kill()
        await asyncio.to_thread(process.wait)
    finally:
        if process.stdin is not None:
            process.stdin.close()
