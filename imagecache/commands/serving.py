"""`cubecache serve`."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

import click

from imagecache.session import Session, fill_option, json_option

if TYPE_CHECKING:
    from imagecache.daemon.service import Service


@click.command(
    epilog="\b\nExamples:\n  cubecache serve\n  cubecache --store "
    "'s3://images/prod?endpoint=http://127.0.0.1:9000' serve --fill hot"
)
@fill_option
@click.option("--tcp", metavar="HOST:PORT", help="Serve exports on this TCP address too.")
@click.option("--until-stdin-closes", is_flag=True, hidden=True)
@json_option
@click.pass_obj
def serve(session: Session, *, fill: str | None, tcp: str | None, until_stdin_closes: bool) -> None:
    """Run the host daemon in the foreground until SIGTERM.

    The control API answers on STATE/control.sock, NBD on STATE/nbd.sock. Exports persist: they
    are there again, before the sockets listen, whenever the daemon starts.
    """
    # The daemon's imports would double the start of every other command.
    from imagecache.daemon.serve import serve as run_daemon  # noqa: PLC0415

    settings = session.settings
    if fill is not None:
        settings = dataclasses.replace(
            settings, cache=dataclasses.replace(settings.cache, fill=fill)
        )
    if tcp is not None:
        settings = dataclasses.replace(settings, nbd=dataclasses.replace(settings.nbd, tcp=tcp))
    logging.getLogger("imagecache").setLevel(logging.INFO)

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

    asyncio.run(run_daemon(settings, announce, until_stdin_closes=until_stdin_closes))
