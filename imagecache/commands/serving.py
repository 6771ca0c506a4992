"""`cubecache serve`."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

import click

from imagecache.session import Session, Settings, fill_option, json_option

if TYPE_CHECKING:
    from imagecache.daemon.service import Service


@click.command(
    epilog="\b\nExamples:\n  cubecache serve\n  cubecache --store "
    "'s3://images/prod?endpoint=http://127.0.0.1:9000' serve --fill hot"
)
@fill_option
@click.option("--tcp", metavar="HOST:PORT", help="Serve exports on this TCP address too.")
@click.option("--until-stdin-closes", is_flag=True, hidden=True)
@click.option("--take-over", type=int, metavar="FD", hidden=True)
@json_option
@click.pass_obj
def serve(
    session: Session,
    *,
    fill: str | None,
    tcp: str | None,
    until_stdin_closes: bool,
    take_over: int | None,
) -> None:
    """Run the host daemon in the foreground until SIGTERM.

    The control API answers on STATE/control.sock, NBD on STATE/nbd.sock. Exports persist: they
    are there again, before the sockets listen, whenever the daemon starts. SIGHUP reads the
    configuration again.
    """
    # The daemon's imports would double the start of every other command.
    from imagecache.daemon.logs import set_up_logs  # noqa: PLC0415
    from imagecache.daemon.serve import serve as run_daemon  # noqa: PLC0415

    flags = {"cache.fill": ("--fill", fill), "nbd.tcp": ("--tcp", tcp)}

    def read() -> Settings:
        settings = session.read_settings()
        for name, (flag, value) in flags.items():
            if value is not None:
                settings = settings.with_flag(name, value, flag)
        return settings

    settings = read()
    set_up_logs(settings.log)

    def announce(service: Service) -> None:
        answer: dict[str, Any] = {
            "state": "ready",
            "pid": os.getpid(),
            "control": str(settings.control_socket),
            "nbd": str(settings.nbd_socket),
            "exports": [export.record.name for export in service.exports()],
        }
        session.terminal.answer(
            answer,
            f"ready: control {settings.control_socket}, NBD {settings.nbd_socket}, "
            f"{len(answer['exports'])} exports",
        )

    predecessor = None
    if take_over is not None:
        os.set_inheritable(take_over, False)
        predecessor = socket.socket(fileno=take_over)
    asyncio.run(
        run_daemon(
            settings,
            announce,
            reread=read,
            until_stdin_closes=until_stdin_closes,
            command=_own_command(),
            predecessor=predecessor,
        )
    )


def _own_command() -> list[str]:
    """What started this daemon, without what it took over from."""
    words = list(sys.orig_argv)
    while "--take-over" in words:
        at = words.index("--take-over")
        del words[at : at + 2]
    return words
