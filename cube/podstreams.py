"""What joins a terminal, files and ports of this host to a pod: exec, cp and port-forward."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import termios
import tty as terminals
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from cube.orchestrator import Cube
from cube.podsession import STDERR, STDOUT, PodSession
from imagecache.errors import CubecacheError, NotFound, Rejected, Unavailable, UsageError

_PIECE: Final = 64 * 1024
_CONNECTIONS: Final = 32


async def run_program(
    cube: Cube,
    name: str,
    command: Sequence[str],
    *,
    container: str | None,
    stdin: bool,
    tty: bool,
) -> int:
    """Runs a program in a pod on this process's streams; its exit status."""
    size = shutil.get_terminal_size()
    async with cube.open_exec(
        name,
        command,
        container=container,
        tty=tty,
        stdin=stdin,
        size=(size.lines, size.columns),
        environment=(f"TERM={os.environ.get('TERM', 'xterm')}",) if tty else (),
    ) as session:
        with _raw_terminal(tty), _signals(session, tty):
            feeding = asyncio.create_task(_feed(session)) if stdin else None
            try:
                async for stream, content in session.messages():
                    await asyncio.to_thread(_write_all, stream, content)
            finally:
                if feeding is not None:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
    if session.exit is None:
        raise Unavailable("the program's end is not known")
    if session.exit.problem:
        await asyncio.to_thread(_write_all, STDERR, f"cubecache: {session.exit.problem}\n".encode())
    return session.exit.code


async def _feed(session: PodSession) -> None:
    """Copies stdin, and its end. Never read from a thread, which could not be interrupted."""
    loop = asyncio.get_running_loop()
    while True:
        ready: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(0, _settle, ready)
        except PermissionError:
            content = os.read(0, _PIECE)  # a regular file is always ready
        else:
            try:
                await ready
                content = os.read(0, _PIECE)
            finally:
                loop.remove_reader(0)
        if not content:
            await session.end_input()
            return
        await session.write(content)


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


@contextlib.contextmanager
def _raw_terminal(tty: bool) -> Iterator[None]:
    if not (tty and sys.stdin.isatty()):
        yield
        return
    before = termios.tcgetattr(0)
    terminals.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _signals(session: PodSession, tty: bool) -> Iterator[None]:
    """Window changes and, without a terminal, interrupts go to the program."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def resize() -> None:
        size = shutil.get_terminal_size()
        tasks.add(asyncio.create_task(session.resize(size.lines, size.columns)))

    def forward(number: int) -> None:
        tasks.add(asyncio.create_task(session.signal(number)))

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, forward, number)
    if tty:
        loop.add_signal_handler(signal.SIGWINCH, resize)
    try:
        yield
    finally:
        for number in (*numbers, *((signal.SIGWINCH,) if tty else ())):
            loop.remove_signal_handler(number)


# --- files


async def copy_files(cube: Cube, source: str, target: str, *, container: str | None) -> None:
    """Copies a file or directory between this host and a container, as a tar stream.

    The guest's own tar unpacks and packs: an image needs none. Raises UsageError, NotFound.
    """
    from_pod, to_pod = _remote(source), _remote(target)
    if (from_pod is None) == (to_pod is None):
        raise UsageError("one of source and target is NAME:PATH", remedy="web:/etc/nginx.conf .")
    if to_pod is not None:
        await _copy_in(cube, Path(source), *to_pod, container)
    elif from_pod is not None:
        await _copy_out(cube, *from_pod, Path(target), container)


def _remote(text: str) -> tuple[str, str] | None:
    name, colon, path = text.partition(":")
    return (name, path) if colon and not name.startswith((".", "/")) and path else None


async def _copy_in(cube: Cube, source: Path, name: str, target: str, container: str | None) -> None:
    if not await asyncio.to_thread(source.exists):
        raise NotFound(f"there is no {source}")
    into, _, last = target.rstrip("/").rpartition("/")
    if target.endswith("/") or await _is_directory(cube, name, target, container):
        into, last = target, source.name
    words = ("cube:busybox", "tar", "-x", "-C", into or "/")
    with tempfile.TemporaryFile() as packed:
        await asyncio.to_thread(_pack, source, last, packed)
        async with cube.open_exec(name, words, container=container, stdin=True) as session:
            feeding = asyncio.create_task(_pour(packed, session))
            try:
                await _finish(session, io.BytesIO(), f"copying to {name}:{target}")
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)


def _pack(source: Path, name: str, into: BinaryIO) -> None:
    with tarfile.open(fileobj=into, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(source, arcname=name)
    into.seek(0)


async def _pour(packed: BinaryIO, session: PodSession) -> None:
    while content := await asyncio.to_thread(packed.read, _PIECE):
        await session.write(content)
    await session.end_input()


async def _is_directory(cube: Cube, name: str, path: str, container: str | None) -> bool:
    words = ("cube:busybox", "test", "-d", path)
    code, _, _ = await cube.exec(name, words, container=container)
    return code == 0


async def _copy_out(
    cube: Cube, name: str, source: str, target: Path, container: str | None
) -> None:
    above, _, last = source.rstrip("/").rpartition("/")
    words = ("cube:busybox", "tar", "-c", "-C", above or "/", last or ".")
    with tempfile.TemporaryFile() as packed:
        async with cube.open_exec(name, words, container=container) as session:
            await _finish(session, packed, f"copying {name}:{source}")
        await asyncio.to_thread(_unpack, packed, last, target)


def _unpack(packed: BinaryIO, name: str, target: Path) -> None:
    """Unpacks what a guest sent: it is not trusted to keep to the target."""
    packed.seek(0)
    into = target / name if target.is_dir() else target
    try:
        with tempfile.TemporaryDirectory(
            dir=into.absolute().parent, prefix=".cubecache-cp-"
        ) as near:
            with tarfile.open(fileobj=packed) as tar:
                _extract(tar, Path(near))
            found = Path(near) / name
            if not found.exists() and not found.is_symlink():
                raise NotFound(f"the pod sent no {name!r}")
            if into.is_dir() and found.is_dir():
                shutil.copytree(found, into, dirs_exist_ok=True, symlinks=True)
            else:
                found.replace(into)
    except (tarfile.TarError, EOFError, KeyError) as error:
        raise Rejected(f"the pod sent a broken or hostile archive: {error}") from error
    except OSError as error:
        raise Rejected(f"{into} cannot be written: {error.strerror}") from error


def _extract(tar: tarfile.TarFile, into: Path) -> None:
    """Files, directories and links below `into`. Symbolic links come last, so that nothing is
    written through one; devices and the like are left out. Blocking.
    """
    links: list[tuple[Path, str]] = []
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if member.name.startswith("/") or ".." in parts:
            raise Rejected(f"the pod sent the name {member.name[:80]!r}, which leaves the target")
        path = into.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        if member.isdir():
            path.mkdir(exist_ok=True)
        elif member.issym():
            links.append((path, member.linkname))
        elif member.isreg() or member.islnk():
            source = tar.extractfile(member)  # a hard link's is the file that it names
            if source is None:
                raise Rejected(f"the pod sent {member.name[:80]!r} without contents")
            with source, path.open("xb") as file:
                shutil.copyfileobj(source, file)
            path.chmod(member.mode & 0o777)
    for path, target in links:
        path.symlink_to(target)


async def _finish(session: PodSession, output: BinaryIO, what: str) -> None:
    complaint = bytearray()
    async for stream, content in session.messages():
        if stream == STDOUT:
            await asyncio.to_thread(output.write, content)
        elif len(complaint) < _PIECE:
            complaint += content
    if session.exit is None or session.exit.code:
        problem = session.exit.problem if session.exit is not None else ""
        text = problem or complaint.decode("utf-8", "replace").strip()[:400]
        raise NotFound(f"{what} failed: {text}")


# --- ports


async def forward_ports(
    cube: Cube, name: str, ports: Sequence[str], address: str, say: Callable[[str], None]
) -> None:
    """Listens on ports of this host and leads their connections into the pod, until cancelled."""
    await cube.get(name)
    places = asyncio.Semaphore(_CONNECTIONS)
    async with contextlib.AsyncExitStack() as stack:
        for text in ports:
            local, _, remote = text.rpartition(":")
            try:
                here, there = int(local or remote), int(remote)
            except ValueError as error:
                raise UsageError(f"{text!r} is not [LOCAL:]PORT") from error

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = there
            ) -> None:
                async with places:
                    await _forward(cube, name, port, say, reader=reader, writer=writer)

            try:
                server = await asyncio.start_server(serve, address, here)
            except OSError as error:
                raise Unavailable(f"port {here} cannot be had: {error.strerror}") from error
            await stack.enter_async_context(server)
            bound = server.sockets[0].getsockname()
            say(f"forwarding {bound[0]}:{bound[1]} to port {there} of {name}")
        await asyncio.get_running_loop().create_future()


async def _forward(
    cube: Cube,
    name: str,
    port: int,
    say: Callable[[str], None],
    *,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    try:
        async with cube.connect(name, port) as session:
            sending = asyncio.create_task(_send(reader, session))
            try:
                async for stream, content in session.messages():
                    if stream != STDOUT:
                        continue
                    if content:
                        writer.write(content)
                        await writer.drain()
                    elif writer.can_write_eof():
                        writer.write_eof()
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            if session.exit is not None and session.exit.problem:
                say(f"port {port}: {session.exit.problem}")
    except (CubecacheError, OSError) as error:
        say(f"port {port}: {error}")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _send(reader: asyncio.StreamReader, session: PodSession) -> None:
    while content := await reader.read(_PIECE):
        await session.write(content)
    await session.end_input()
