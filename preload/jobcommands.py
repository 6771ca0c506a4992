"""`cubecache jobs`: the daemon's preload jobs."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from imagecache.errors import UsageError
from imagecache.session import Session, json_option
from imagecache.terminal import size_text, table_text
from preload.client import Client, connect


@click.group(
    invoke_without_command=True,
    epilog="\b\nExamples:\n  cubecache jobs\n  cubecache jobs pause 3f2a\n"
    "  cubecache jobs cancel 3f2a",
)
@json_option
@click.pass_context
def jobs(context: click.Context) -> None:
    """List the daemon's preload jobs; pause, resume or cancel one."""
    if context.invoked_subcommand is None:
        asyncio.run(_list(context.obj))


async def _list(session: Session) -> None:
    async with connect(session.settings, start=False) as client:
        found = await client.jobs()
    rows = [("ID", "STATE", "PRIORITY", "PROGRESS", "IMAGE")]
    rows += [
        (job["id"][:12], job["state"], str(job["priority"]), _progress(job), job["image"])
        for job in found
    ]
    session.terminal.answer(found, table_text(rows))


def _progress(job: dict[str, Any]) -> str:
    progress = job["progress"]
    if job["state"] == "failed":
        return str(job["error"]["kind"])
    if job["state"] != "running" or progress is None:
        return "-"
    text = f"{progress['stage']} {progress['layer']}/{progress['layers']}"
    if progress["bytes_per_second"]:
        text += f" {size_text(progress['bytes_per_second'])}/s"
        text += f" {progress['seconds_left']:.0f} s left"
    return text


def _change(name: str, text: str) -> None:
    @jobs.command(name, help=text, epilog=f"\b\nExamples:\n  cubecache jobs {name} 3f2a")
    @click.argument("identity", metavar="ID")
    @json_option
    @click.pass_obj
    def change(session: Session, *, identity: str) -> None:
        job = asyncio.run(_changed(session, name, identity))
        session.terminal.answer(job, f"{job['id']}  {job['state']}  {job['image']}")


async def _changed(session: Session, name: str, identity: str) -> dict[str, Any]:
    async with connect(session.settings, start=False) as client:
        whole = await _whole(client, identity)
        changed: dict[str, Any] = await getattr(client, name)(whole)
        return changed


async def _whole(client: Client, start: str) -> str:
    """The id that starts so; as it is where none does, so that the daemon answers."""
    found = [job["id"] for job in await client.jobs() if job["id"].startswith(start)]
    if len(found) > 1:
        raise UsageError(f"{start} is the start of {len(found)} jobs", remedy="give more of it")
    return found[0] if found else start


_change("cancel", "Cancel a job; what it downloaded stays for a later one.")
_change("pause", "Stop a job until it is resumed.")
_change("resume", "Queue a paused job again; it goes on where it stopped.")
