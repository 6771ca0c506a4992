"""The QEMU driver: one process per machine, a unix socket for its agent, its console kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from pathlib import Path
from typing import Final

from cube.errors import BootFailed
from cube.vm.adopted import AdoptedMachine, adopt
from cube.vm.qemu_command import Platform, check_spec, command
from cube.vm.seam import MachineSpec
from cube.vm.tail import Tail
from cube.vm.tie import tie
from imagecache.errors import Unavailable, Unsupported

CHANNEL_SOCKET: Final = "agent.sock"
_READ_LIMIT: Final = 1024 * 1024


def emulator() -> Path:
    """QEMU for this host's architecture; raises Unsupported with the package to install."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(os.uname().machine, os.uname().machine)
    found = shutil.which(f"qemu-system-{machine}")
    if found is None:
        package = "qemu-system-x86" if machine == "x86_64" else "qemu-system-arm"
        raise Unsupported(
            f"this host has no qemu-system-{machine}", remedy=f"apt-get install {package}"
        )
    return Path(found)


class QemuMachine:
    """A running QEMU; see `cube.vm.seam.Machine`. Owned by whoever called `QemuDriver.start`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        console: socket.socket,
        channel_path: Path,
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.console = Tail()
        self._process = process
        self._channel_path = channel_path
        self._complaints = Tail()
        self._collectors = (
            asyncio.create_task(self._collect_console(console)),
            asyncio.create_task(self._collect_complaints()),
        )

    @property
    def process_id(self) -> int:
        """The QEMU process."""
        return self._process.pid

    async def wait(self) -> int:
        """QEMU's exit status (negative: the signal that ended it), after its output was read."""
        status = await self._process.wait()
        # Both ends of its output close with it; a second is plenty for what is in the buffers.
        await asyncio.wait(self._collectors, timeout=1)
        return status

    async def stop(self) -> None:
        """Kills QEMU, waits for it, and removes its socket."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        for collector in self._collectors:
            collector.cancel()
        await asyncio.gather(*self._collectors, return_exceptions=True)
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
        self._channel_path.unlink(missing_ok=True)

    def last_words(self) -> list[str]:
        """QEMU's complaints, then the guest's console."""
        return [*self._complaints.lines(), *self.console.lines()]

    async def _collect_console(self, console: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with console:
            while received := await loop.sock_recv(console, 65536):
                self.console.feed(received)

    async def _collect_complaints(self) -> None:
        stderr = self._process.stderr
        while stderr is not None and (received := await stderr.read(65536)):
            self._complaints.feed(received)


class QemuDriver:
    """Starts machines of one platform (see `cube.vm.platform.choose_platform`)."""

    name = "qemu"

    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    async def describe(self) -> dict[str, str]:
        """Machine type, accelerator and QEMU's version."""
        return {
            "driver": self.name,
            "machine": self.platform.machine,
            "accelerator": self.platform.accelerator,
            "version": await emulator_version(self.platform.program),
        }

    async def start(self, spec: MachineSpec) -> QemuMachine:
        """A running machine, its channel connected (its agent may not be up yet)."""
        check_spec(self.platform, spec)
        listener, channel = _channel_pair(spec.directory)
        console, console_far = socket.socketpair()
        process: asyncio.subprocess.Process | None = None
        try:
            console.setblocking(False)
            words = command(
                self.platform,
                spec,
                channel_fd=listener.fileno(),
                console_fd=console_far.fileno(),
            )
            process = await asyncio.create_subprocess_exec(
                *tie(dies_with_owner=spec.dies_with_owner),
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(listener.fileno(), console_far.fileno()),
                # Ctrl-C is for the program in the machine: the terminal must not reach QEMU.
                start_new_session=True,
            )
            reader, writer = await asyncio.open_unix_connection(sock=channel, limit=_READ_LIMIT)
        except BaseException as error:
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()
            channel.close()
            console.close()
            (spec.directory / CHANNEL_SOCKET).unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise BootFailed(f"QEMU cannot be started: {error}") from error
            raise
        finally:
            # QEMU has its own copies now.
            listener.close()
            console_far.close()
        return QemuMachine(process, reader, writer, console, spec.directory / CHANNEL_SOCKET)

    async def adopt(self, process_id: int, started: int, directory: Path) -> AdoptedMachine:
        """A machine that an earlier process of ours started; raises MachineFailed."""
        return await adopt(process_id, started, directory / CHANNEL_SOCKET, limit=_READ_LIMIT)


async def emulator_version(program: Path) -> str:
    """The first line of `--version`; raises Unavailable."""
    try:
        process = await asyncio.create_subprocess_exec(
            str(program),
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        output, _ = await asyncio.wait_for(process.communicate(), 20)
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"{program} does not answer: {error}") from error
    return output.decode("utf-8", "replace").partition("\n")[0]


def _channel_pair(directory: Path) -> tuple[socket.socket, socket.socket]:
    """A listening socket for QEMU to inherit, and our connection to it: nobody has to poll."""
    path = directory / CHANNEL_SOCKET
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    handle = -1
    try:
        path.unlink(missing_ok=True)  # an earlier machine's, whose owner was killed
        handle = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        # By way of the directory's descriptor: a socket's path has 107 bytes at most.
        listener.bind(f"/proc/self/fd/{handle}/{path.name}")
        listener.listen(1)
        channel.connect(f"/proc/self/fd/{handle}/{path.name}")
        channel.setblocking(False)
    except OSError as error:
        listener.close()
        channel.close()
        raise BootFailed(f"the machine's channel {path} cannot be made: {error}") from error
    finally:
        if handle >= 0:
            os.close(handle)
    return listener, channel
