"""`cubecache upgrade`: the daemon's next version takes over."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from imagecache.session import Session, json_option
from preload.client import connect


@click.command(
    epilog="\b\nExamples:\n  apt-get install --only-upgrade cubecache && cubecache upgrade"
)
@json_option
@click.pass_obj
def upgrade(session: Session) -> None:
    """Let the daemon's new version take over, without a drop.

    The daemon starts its own command line again, from what is installed now, with the settings
    as they are now. Sockets and plain NBD clients move to the new process at a request boundary;
    clients over TLS reconnect. Where the new version does not start or refuses, the old one goes
    on and this fails.
    """

    async def call() -> dict[str, Any]:
        async with connect(session.settings, start=False) as client:
            answer: dict[str, Any] = await client.call("POST", "/v1/upgrade")
            return answer

    answer = asyncio.run(call())
    session.terminal.answer(answer, f"process {answer['pid']} has taken over")
