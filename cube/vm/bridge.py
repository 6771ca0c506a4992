"""Disks over vhost-user: one qemu-storage-daemon serves a machine's disks on unix sockets.

For machines that speak no NBD (Firecracker), and as a stand-in for SPDK. Its options, from its own
manual page: `--blockdev`, `--object throttle-group`, `--export type=vhost-user-blk,addr.type=unix`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cube.errors import BootFailed
from cube.vm.adopted import process_start
from cube.vm.qemu_command import disk_node, throttle_words
from cube.vm.seam import FileDisk, NbdDisk, Rates
from cube.vm.tail import Tail
from cube.vm.tie import tie
from imagecache.errors import Unsupported

PROGRAM: Final = "qemu-storage-daemon"
RECORD: Final = "bridge.json"
UNLIMITED: Final = Rates()
_START_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.005


def socket_name(index: int) -> str:
    """The socket of the disk with this number, in the bridge's directory. Short on purpose."""
    return f"vu-{index}.sock"


def storage_daemon() -> Path:
    """The program; raises Unsupported with the package to install."""
    found = shutil.which(PROGRAM)
    if found is None:
        raise Unsupported(
            f"this host has no {PROGRAM}, which serves disks over vhost-user",
            remedy="apt-get install qemu-system-common",
        )
    return Path(found)


def bridge_command(
    program: Path, disks: Sequence[NbdDisk | FileDisk], rates: Rates = UNLIMITED
) -> list[str]:
    """The words that serve the disks, in their order; sockets are relative to its directory."""
    words = [str(program), *throttle_words(rates)]
    words = ["--object" if word == "-object" else word for word in words]
    for index, disk in enumerate(disks):
        export = {
            "type": "vhost-user-blk",
            "id": f"export{index}",
            "node-name": f"disk{index}",
            "addr": {"type": "unix", "path": socket_name(index)},
            "writable": not disk.read_only,
        }
        words += ["--blockdev", json.dumps(disk_node(index, disk, rates))]
        words += ["--export", json.dumps(export)]
    return words


class Bridge:
    """The running daemon and its sockets. Owned by whoever called `start_bridge`."""

    def __init__(
        self, process: asyncio.subprocess.Process, directory: Path, record: Path, count: int
    ) -> None:
        self._process = process
        self._record = record
        self.sockets = tuple(directory / socket_name(index) for index in range(count))
        self._complaints = Tail()
        self._collector = asyncio.create_task(self._collect())

    @property
    def process_id(self) -> int:
        """The daemon's process."""
        return self._process.pid

    async def ready(self) -> None:
        """Returns once all sockets are there; raises BootFailed with what the daemon said."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not all(path.is_socket() for path in self.sockets):
                    if self._process.returncode is not None:
                        status = await self.wait()
                        raise BootFailed(
                            f"{PROGRAM} ended with status {status}", console=self.last_words()
                        )
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            raise BootFailed(
                f"{PROGRAM} served no disks within {_START_SECONDS:g} seconds",
                console=self.last_words(),
            ) from error

    async def wait(self) -> int:
        """The daemon's exit status, after its output was read."""
        status = await self._process.wait()
        await asyncio.wait({self._collector}, timeout=1)
        return status

    async def stop(self) -> None:
        """Kills the daemon, waits for it, removes its sockets. Idempotent."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        self._collector.cancel()
        await asyncio.gather(self._collector, return_exceptions=True)
        for path in (*self.sockets, self._record):
            path.unlink(missing_ok=True)

    def last_words(self) -> list[str]:
        """What it complained of last."""
        return self._complaints.lines()

    async def _collect(self) -> None:
        stderr = self._process.stderr
        while stderr is not None and (received := await stderr.read(65536)):
            self._complaints.feed(received)


async def start_bridge(
    disks: Sequence[NbdDisk | FileDisk],
    directory: Path,
    *,
    rates: Rates = UNLIMITED,
    record_in: Path | None = None,
    dies_with_owner: bool = True,
) -> Bridge:
    """Serves the disks from sockets in `directory`; what `left_behind` reads is written there, or
    into `record_in`. Raises BootFailed, Unsupported.
    """
    kept = record_in or directory
    words = bridge_command(storage_daemon(), disks, rates)
    await asyncio.to_thread(end_left_behind, kept)
    try:
        process = await asyncio.create_subprocess_exec(
            *tie(dies_with_owner=dies_with_owner),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            cwd=directory,
            start_new_session=True,
        )
    except OSError as error:
        raise BootFailed(f"{PROGRAM} cannot be started: {error}") from error
    bridge = Bridge(process, directory, kept / RECORD, len(disks))
    try:
        record = {"process": process.pid, "started": process_start(process.pid)}
        (kept / RECORD).write_text(json.dumps(record))
        await bridge.ready()
    except BaseException as error:
        await asyncio.shield(bridge.stop())
        if isinstance(error, OSError):
            raise BootFailed(f"{PROGRAM} cannot be recorded: {error}") from error
        raise
    return bridge


def left_behind(directory: Path) -> int:
    """The process that serves this directory's disks, whoever of us started it; 0: none."""
    try:
        record = json.loads((directory / RECORD).read_text())
        pid, started = int(record["process"]), int(record["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return pid if started and process_start(pid) == started else 0


def end_left_behind(directory: Path) -> None:
    """Kills what serves this directory's disks and removes its sockets."""
    pid = left_behind(directory)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in (*directory.glob("vu-*.sock"), directory / RECORD):
        path.unlink(missing_ok=True)
