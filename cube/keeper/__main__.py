"""`python -m cube.keeper`: the keeper of one state directory, until SIGTERM."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import click
from aiohttp import web

from cube.guest.assets import default_cache
from cube.keeper.keeper import Keeper
from cube.keeper.server import make_application
from cube.keeper.setkeeping import SetKeeper
from imagecache.errors import Busy, CubecacheError, Denied, UsageError, exit_code
from imagecache.session import Session, Settings

SOCKET_NAME = "pods.sock"
_LONGEST = 75  # bytes of a state directory, so that sockets below it have names: 107 at most
_SHUTDOWN_SECONDS = 2.0


@click.command()
@click.option("--config", type=click.Path(path_type=Path))
@click.option("--state-dir", type=click.Path(path_type=Path))
@click.option("--store")
@click.option("--realm")
def main(config: Path | None, state_dir: Path | None, store: str | None, realm: str | None) -> None:
    """Keep the pods of a state directory; started by `cubecache pod` where none runs."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = Session(config, state_dir, store, realm).settings
        asyncio.run(_keep(settings))
    except CubecacheError as error:
        click.echo(f"cubecache: {error}", err=True)
        sys.exit(exit_code(error))


async def _keep(settings: Settings) -> None:
    state = settings.state_dir
    if len(os.fsencode(state)) > _LONGEST:
        raise UsageError(
            f"the state directory's path is longer than {_LONGEST} bytes, too long for sockets",
            remedy="choose a shorter one for pods",
        )
    descriptor = _lock(state)
    keeper = Keeper(settings, default_cache(os.environ))
    sets = SetKeeper(keeper)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    runner = web.AppRunner(
        make_application(keeper, sets), access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS
    )
    try:
        await keeper.open()
        await sets.open()
        await runner.setup()
        await web.SockSite(runner, _listen(state / SOCKET_NAME)).start()
        logging.getLogger("cube.keeper").info("keeping the pods of %s", state)
        await stopping.wait()
    finally:
        await runner.cleanup()
        await sets.close()
        await keeper.close()
        (state / SOCKET_NAME).unlink(missing_ok=True)
        os.close(descriptor)


def _lock(state: Path) -> int:
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(state / "pods.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Denied(f"{state} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise Busy(f"another keeper has {state}") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)  # for people, and who must end it
    return descriptor


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise Denied(f"{path} cannot be made: {error.strerror}") from error
    finally:
        os.umask(before)
    listener.listen(128)
    listener.setblocking(False)
    return listener


if __name__ == "__main__":
    main()
