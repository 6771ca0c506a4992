"""A machine that an earlier process of ours started and left running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path

from cube.errors import MachineFailed

_CONNECT_SECONDS = 10.0


def process_start(pid: int) -> int:
    """When a process started, in clock ticks since the host's boot; 0 where there is none.

    With its id it names one process for ever: ids alone come again. Source: proc(5), stat, 22.
    """
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    # The program's name may hold anything; what follows its last parenthesis is numbers.
    fields = content.rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        return 0
    return int(fields[19])


class AdoptedMachine:
    """See `cube.vm.seam.Machine`. Its console and exit status went to whoever started it."""

    def __init__(
        self,
        pid: int,
        descriptor: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        channel_path: Path,
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.process_id = pid
        self._descriptor = descriptor
        self._channel_path = channel_path
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = loop.create_future()
        loop.add_reader(descriptor, self._on_end)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        if not self._ended.done():
            self._ended.set_result(None)

    async def wait(self) -> int:
        """0 when the process has ended: nobody but its parent is told the status."""
        await asyncio.shield(self._ended)
        return 0

    async def stop(self) -> None:
        """Kills the process, waits for it, and removes its socket."""
        if self._descriptor >= 0:
            if not self._ended.done():
                self.kill()
                await asyncio.shield(self._ended)
            os.close(self._descriptor)
            self._descriptor = -1
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
        self._channel_path.unlink(missing_ok=True)

    def kill(self) -> None:
        """Ends the process, whose end is not awaited."""
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def last_words(self) -> list[str]:
        """None: the console went to whoever started the machine."""
        return []


def handle_of(pid: int, started: int) -> int:
    """A descriptor of the process, to signal and to await it; raises MachineFailed."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        raise MachineFailed(f"the machine's process {pid} is gone") from error
    if process_start(pid) != started:
        os.close(descriptor)
        raise MachineFailed(f"the machine's process {pid} is gone")
    return descriptor


async def adopt(pid: int, started: int, channel_path: Path, *, limit: int) -> AdoptedMachine:
    """The machine that process is, its channel connected; raises MachineFailed where it is gone."""
    descriptor = handle_of(pid, started)
    try:
        channel = await asyncio.wait_for(_connected(channel_path), _CONNECT_SECONDS)
        reader, writer = await asyncio.open_unix_connection(sock=channel, limit=limit)
    except (OSError, TimeoutError) as error:
        os.close(descriptor)
        raise MachineFailed(f"the machine's channel {channel_path} does not answer") from error
    except BaseException:
        os.close(descriptor)
        raise
    return AdoptedMachine(pid, descriptor, reader, writer, channel_path)


async def _connected(path: Path) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.setblocking(False)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        # By way of the directory's descriptor: a socket's path has 107 bytes at most.
        await asyncio.get_running_loop().sock_connect(
            channel, f"/proc/self/fd/{directory}/{path.name}"
        )
    except BaseException:
        channel.close()
        raise
    finally:
        os.close(directory)
    return channel
