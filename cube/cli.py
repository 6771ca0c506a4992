"""`cubecache run` (and the commands of `cube.mounting`)."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from cube.container import ImageDefaults, Overrides, parse_environment
from cube.errors import MachineFailed
from cube.guest.assets import default_cache
from cube.mounting import mount, umount
from cube.run import RootExport, RunOutcome, RunSettings, Streams, run_image
from imagecache.errors import CubecacheError
from imagecache.session import (
    Session,
    face_option,
    fill_option,
    json_option,
    platform_option,
    record_option,
)
from preload.client import Client, ExportHandle, connect

_SIZE = re.compile(r"(\d{1,9})([KMGT]?)(iB|B|b)?", re.IGNORECASE)
_UNITS = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def register(group: click.Group) -> None:
    """Adds this package's commands."""
    for command in (run, mount, umount, pod):
        group.add_command(command)


class _Pods(click.Group):
    """`pod`, whose commands are imported when one is used: they need what others do not."""

    @property
    def _commands(self) -> click.Group:
        group: click.Group = importlib.import_module("cube.podcommands").pod
        return group

    def list_commands(self, ctx: click.Context) -> list[str]:
        return self._commands.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._commands.get_command(ctx, cmd_name)


@click.group(cls=_Pods)
def pod() -> None:
    """Run Kubernetes pods in microVMs, one machine a pod."""


class _Size(click.ParamType):  # type: ignore[type-arg]  # older click has no []
    """A size such as 512M or 2GiB; a bare number is MiB."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value))
        if match is None or (match[3] and not match[2]):
            self.fail(f"{value!r} is not a size such as 512M or 2G", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


@click.command(
    epilog="\b\nExamples:\n"
    "  cubecache run docker.io/library/python:3.12-slim -- python3 -c 'print(1)'\n"
    "  cubecache run --env LEVEL=3 --user app --memory 1G --cpus 2 oci:./image:latest\n"
    "\b\nThe exit status is the program's: 128 + signal where one ended it, 127 where it is not\n"
    "in the image, 126 where it cannot be run, 125 where its user or directory is wrong."
)
@click.argument("image")
@click.argument("command", metavar="[-- CMD ARG...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--memory", type=_Size(), default="512M", show_default=True, metavar="SIZE")
@click.option("--cpus", type=int, default=1, show_default=True, metavar="N")
@click.option("-e", "--env", "environment", multiple=True, metavar="NAME=VALUE")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Names of the image, or numbers.")
@click.option("-w", "--workdir", metavar="DIR", help="Made if it is not there.")
@click.option("--entrypoint", metavar="CMD", help="Instead of the image's; empty for none.")
@click.option("--hostname", default="", metavar="NAME")
@click.option("-i", "--interactive", is_flag=True, help="Give the program this command's stdin.")
@click.option("--kernel", type=click.Path(path_type=Path), help="A guest kernel of your own.")
@click.option("--initrd", type=click.Path(path_type=Path), help="An initramfs of your own.")
@click.option("--timeout", type=click.FloatRange(min=0.001), metavar="SECONDS")
@click.option("--timeline", is_flag=True, help="Print when what happened, on stderr.")
@platform_option
@face_option
@fill_option
@record_option
@json_option
@click.pass_obj
def run(
    session: Session,
    *,
    image: str,
    command: tuple[str, ...],
    memory: int,
    cpus: int,
    environment: tuple[str, ...],
    user: str | None,
    workdir: str | None,
    entrypoint: str | None,
    hostname: str,
    interactive: bool,
    kernel: Path | None,
    initrd: Path | None,
    timeout: float | None,
    timeline: bool,
    platform: str | None,
    face: str,
    fill: str | None,
    record: bool,
) -> int:
    """Run an image's program in a microVM whose root is that image, read lazily.

    Below is the image, read-only; what the program writes stays in the machine's memory. With
    --json the program's stdout goes to stderr, and the outcome alone to stdout.
    """
    overrides = Overrides(
        command=command or None,
        entrypoint=None if entrypoint is None else (entrypoint,),
        environment=parse_environment(environment, os.environ),
        user=user,
        working_directory=workdir,
    )
    settings = RunSettings(
        cache=default_cache(os.environ),
        memory_bytes=memory,
        cpus=cpus,
        kernel=kernel,
        initrd=initrd,
        seconds=timeout,
        hostname=hostname,
    )
    streams = Streams(
        stdout=2 if session.terminal.json else 1, stderr=2, stdin=0 if interactive else None
    )

    async def call() -> tuple[ExportHandle, RunOutcome, float]:
        begun = time.monotonic()
        async with connect(session.settings) as client:
            with tempfile.TemporaryDirectory(prefix="cubecache-run-") as directory:
                name = f"run-{secrets.token_hex(6)}"
                handle = await client.export(
                    image,
                    socket=Path(directory) / "root.sock",
                    name=name,
                    fill=fill,
                    record=record,
                    platform=platform,
                    face=face,
                )
                exported = time.monotonic() - begun
                try:
                    root = _root_of(handle)
                    return handle, await run_image(root, overrides, settings, streams), exported
                finally:
                    if record:
                        await _store_recording(client, handle.name, session)
                    await _unexport(client, handle.name, session)

    try:
        handle, outcome, exported = asyncio.run(call())
    except MachineFailed as error:
        for line in error.console[-15:]:
            session.terminal.note(f"  | {line}")
        raise
    if outcome.exit.problem:
        session.terminal.note(f"cubecache: {outcome.exit.problem}")
    if timeline:
        session.terminal.note(_timeline_text(outcome, exported))
    session.terminal.answer(_answer(image, handle, outcome, exported), "")
    return outcome.exit.code


def _root_of(handle: ExportHandle) -> RootExport:
    return RootExport(
        socket=handle.socket,
        export=handle.name,
        file_system=handle.face,
        defaults=ImageDefaults(
            entrypoint=handle.config.entrypoint,
            command=handle.config.cmd,
            environment=handle.config.env,
            user=handle.config.user,
            working_directory=handle.config.working_dir,
        ),
    )


async def _store_recording(client: Client, name: str, session: Session) -> None:
    try:
        state = await client.stop_recording(name)
    except CubecacheError as error:
        session.terminal.note(f"cubecache: the start was not recorded: {error}")
        return
    if state["recording"] != "saved":
        why = state["recording_error"] or state["recording"]
        session.terminal.note(f"cubecache: the start was not recorded: {why}")


async def _unexport(client: Client, name: str, session: Session) -> None:
    try:
        await client.unexport(name, force=True)
    except CubecacheError as error:
        # The program's own outcome must not be lost over this.
        session.terminal.note(f"cubecache: the export {name} could not be ended: {error}")


def _timeline_text(outcome: RunOutcome, exported: float) -> str:
    lines = [f"{exported:9.3f} s  export ready", "    0.000 s  QEMU started"]
    lines += [f"{at:9.3f} s  {name}" for name, at in outcome.timeline]
    lines.append(f"{outcome.exit.read_bytes} bytes read from the root disk")
    return "\n".join(lines)


def _answer(
    image: str, handle: ExportHandle, outcome: RunOutcome, exported: float
) -> dict[str, Any]:
    return {
        "image": handle.image,
        "reference": image,
        "block_image": handle.block_image,
        "exit_status": outcome.exit.code,
        "signal": outcome.exit.signal,
        "problem": outcome.exit.problem,
        "export_seconds": round(exported, 4),
        "timeline": dict(outcome.timeline),
        "read_bytes": outcome.exit.read_bytes,
        **outcome.machine,
    }
