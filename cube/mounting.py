"""`cubecache mount` and `umount`: an image as a directory of this host, read lazily.

An export on a socket of its own becomes a block device (kernel nbd where the module is, else a
file of nbdfuse behind a loop device), and the kernel mounts it read-only, nosuid and nodev. This
is the operator's act: the daemon itself never mounts anything. What belongs to a mount stands in
STATE/mounts, so that `umount` finds it again in another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from imagecache.errors import Busy, CubecacheError, Denied, NotFound, Unavailable, Unsupported
from imagecache.session import (
    Session,
    Settings,
    face_option,
    fill_option,
    json_option,
    platform_option,
    record_option,
)
from preload.client import Client, ExportHandle, answers, connect, start_daemon

START_SECONDS = 30.0
STOP_SECONDS = 15.0
COMMAND_SECONDS = 120.0
_OPTIONS = {"erofs": "ro,nosuid,nodev", "ext4": "ro,nosuid,nodev,noload"}


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What one mount consists of; None where that part is not in use."""

    directory: str
    image: str
    export: str
    socket: str
    fuse_directory: str | None
    own_daemon: int | None  # its pid, where the mount brought its own


class Mounts:
    """The mounts of one state directory."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._root = settings.state_dir / "mounts"

    def path(self, directory: Path) -> Path:
        """Where the record of a mount stands."""
        name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
        return self._root / f"{name}.json"

    def load(self, directory: Path) -> MountRecord:
        """The record of a mount; NotFound."""
        try:
            fields: dict[str, Any] = json.loads(self.path(directory).read_text())
            return MountRecord(**fields)
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise NotFound(f"{directory} is not mounted by cubecache here") from error

    def save(self, record: MountRecord) -> None:
        """Writes a record."""
        path = self.path(Path(record.directory))
        path.with_suffix(".new").write_text(json.dumps(asdict(record)))
        path.with_suffix(".new").replace(path)

    def forget(self, directory: Path) -> None:
        """Removes a record."""
        self.path(directory).unlink(missing_ok=True)

    def directory_for(self, directory: Path) -> Path:
        """A private directory for the parts of one mount."""
        parts = self.path(directory).with_suffix("")
        parts.mkdir(parents=True, exist_ok=True, mode=0o700)
        return parts


def run_command(*command: str) -> None:
    """Runs a program to its end; Unavailable with what it said when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise Unsupported(f"{command[0]} is not installed", remedy="./tools/setup") from error
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(command)} hung") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[:400]}")


def check_host(directory: Path) -> None:
    """Refuses at once what cannot work: no root, no directory, something mounted there."""
    if os.geteuid() != 0:
        raise Denied("mounting needs root", remedy="use sudo, or cubecache run for a microVM")
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory", remedy=f"mkdir -p {directory}")
    if directory.is_mount():
        raise Busy(f"something is mounted on {directory} already")
    if shutil.which("nbdfuse") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Unsupported(
            "this host has neither nbdfuse nor /dev/fuse",
            remedy="apt-get install libnbd-bin, modprobe fuse; cubecache doctor",
        )


async def mount_image(
    settings: Settings,
    directory: Path,
    image: str,
    *,
    fill: str | None,
    platform: str | None,
    face: str,
    record: bool = False,
) -> dict[str, Any]:
    """Exports and mounts an image; nothing is left behind where it raises."""
    mounts = Mounts(settings)
    await asyncio.to_thread(check_host, directory)
    parts = await asyncio.to_thread(mounts.directory_for, directory)
    own: subprocess.Popen[bytes] | None = None
    if not await answers(settings):
        own = await start_daemon(settings, detached=True)
    async with contextlib.AsyncExitStack() as undo:
        if own is not None:
            undo.callback(_stop, own.pid)
        client = await undo.enter_async_context(connect(settings, start=False))
        export = await client.export(
            image, socket=parts / "s", fill=fill, record=record, platform=platform, face=face
        )
        undo.push_async_callback(_unexport, client, export.name)
        fuse = parts / "f"
        await asyncio.to_thread(_start_fuse, export, fuse)
        undo.callback(_end_fuse, str(fuse))
        await asyncio.to_thread(_mount, export, fuse / "disk", directory)
        undo.callback(run_command, "umount", str(directory))
        made = MountRecord(
            directory=str(directory),
            image=export.image,
            export=export.name,
            socket=str(export.socket),
            fuse_directory=str(fuse),
            own_daemon=own.pid if own else None,
        )
        await asyncio.to_thread(mounts.save, made)
        undo.pop_all()
        return asdict(made)


def _start_fuse(export: ExportHandle, fuse: Path) -> None:
    fuse.mkdir(exist_ok=True, mode=0o700)
    log = fuse.with_name("nbdfuse.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["nbdfuse", "-r", str(fuse / "disk"), export.uri],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not (fuse / "disk").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise Unavailable(f"nbdfuse did not start: {log.read_text(errors='replace')[-400:]}")
        time.sleep(0.02)


def _mount(export: ExportHandle, disk: Path, directory: Path) -> None:
    options = f"{_OPTIONS[export.face]},loop"
    run_command("mount", "-t", export.face, "-o", options, str(disk), str(directory))


def _end_fuse(fuse: str) -> None:
    with contextlib.suppress(CubecacheError):
        run_command("fusermount3", "-u", "-z", fuse)


def _stop(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


async def _end_daemon(pid: int) -> None:
    """Tells a daemon to end and waits: whoever mounts next finds the state directory free."""
    _stop(pid)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        await asyncio.sleep(0.05)


async def _unexport(client: Client, name: str) -> None:
    with contextlib.suppress(CubecacheError):
        await client.unexport(name, force=True)


async def umount_image(settings: Settings, directory: Path) -> dict[str, Any]:
    """Unmounts and ends everything that the mount brought; finishes one that was half ended."""
    mounts = Mounts(settings)
    record = await asyncio.to_thread(mounts.load, directory)
    if await asyncio.to_thread(directory.is_mount):
        await asyncio.to_thread(run_command, "umount", str(directory))
    if record.fuse_directory is not None:
        await asyncio.to_thread(_end_fuse, record.fuse_directory)
    if await answers(settings):
        async with connect(settings, start=False) as client:
            with contextlib.suppress(CubecacheError):
                await client.stop_recording(record.export)  # what `mount --record` saw is stored
            await _unexport(client, record.export)
            others = await client.exports()
        if record.own_daemon is not None and not others:
            await _end_daemon(record.own_daemon)
    await asyncio.to_thread(mounts.forget, directory)
    return asdict(record)


@click.command(epilog="\b\nExamples:\n  cubecache mount docker.io/library/nginx /mnt")
@click.argument("image")
@click.argument("directory", type=click.Path(path_type=Path))
@platform_option
@face_option
@fill_option
@record_option
@json_option
@click.pass_obj
def mount(
    session: Session,
    *,
    image: str,
    directory: Path,
    platform: str | None,
    face: str,
    fill: str | None,
    record: bool,
) -> None:
    """Mount an image lazily on this host, read-only."""
    answer = asyncio.run(
        mount_image(
            session.settings,
            directory.resolve(),
            image,
            fill=fill,
            platform=platform,
            face=face,
            record=record,
        )
    )
    session.terminal.answer(answer, f"{image} is mounted on {directory}")


@click.command(epilog="\b\nExamples:\n  cubecache umount /mnt")
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
@click.pass_obj
def umount(session: Session, *, directory: Path) -> None:
    """End a mount of `cubecache mount`."""
    answer = asyncio.run(umount_image(session.settings, directory.resolve()))
    session.terminal.answer(answer, f"{directory} is unmounted")
