"""The `nbdserver` command: serve files from the command line."""

import argparse
import asyncio
import contextlib
import hashlib
import logging
import os
import signal
import socket
import ssl
import sys
from pathlib import Path

from nbdserver.activation import activated_sockets
from nbdserver.device import Device
from nbdserver.exports import StaticExports
from nbdserver.faults import FaultyDevice
from nbdserver.filedevice import FileDevice
from nbdserver.handover import HandoverError, hand_over, take_over
from nbdserver.negotiation import TlsPolicy
from nbdserver.overlay import OverlayDevice, OverlayError
from nbdserver.protocol.handshake import TlsMode
from nbdserver.server import Server
from nbdserver.uri import DEFAULT_PORT

_log = logging.getLogger("nbdserver")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nbdserver",
        description="Serve files as network block devices.",
        epilog="Exit codes: 0 served and stopped, 1 could not serve, 2 wrong arguments.",
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE|DIR", help="a directory serves all its files")
    add("-U", "--unix", type=Path, help="listen on this unix socket")
    add("-i", "--host", default="127.0.0.1", help="TCP address to listen on (default: %(default)s)")
    add("-p", "--port", type=int, help=f"TCP port (default: {DEFAULT_PORT} if no --unix)")
    add("-s", "--stdio", action="store_true", help="serve one client on stdin and stdout")
    add("-w", "--writable", action="store_true", help="allow writes to the files themselves")
    add("-o", "--overlay", type=Path, help="keep writes in a directory here, one per export")
    add("--quota", type=int, metavar="BYTES", help="the most that one overlay may hold")
    add("-e", "--name", help="export name (of a single file)")
    add("--no-list", action="store_true", help="do not tell the names of exports")
    add("--tls", choices=[mode.value for mode in TlsMode], default="off")
    add("--cert", type=Path, help="the server's certificate chain (PEM)")
    add("--key", type=Path, help="its key (PEM)")
    add("--client-ca", type=Path, help="require client certificates signed by this (PEM)")
    add("--faults", metavar="SCRIPT", help="fail as the script says (see nbdserver.faults)")
    add("--control", type=Path, help="hand all clients to whoever connects to this unix socket")
    add("--take-over", type=Path, help="take all clients from the server with this --control")
    add("-v", "--verbose", action="store_true", help="log what clients do wrong")
    return parser


def tls_policy(mode: str, cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsPolicy:
    """The policy of the command's options. Raises ValueError, OSError (unreadable files)."""
    if mode == "off":
        return TlsPolicy()
    if cert is None:
        raise ValueError("TLS needs --cert")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return TlsPolicy(TlsMode(mode), context)


def _identity(path: Path) -> bytes:
    status = path.stat()
    return hashlib.sha256(f"{path.resolve()}\0{status.st_size}".encode()).digest()


class _Disks:
    """The devices of the command line, opened together and closed together."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._open: list[Device] = []
        self.exports = StaticExports({})

    def open(self) -> None:
        """Open all files. OSError, OverlayError, ValueError."""
        arguments = self._arguments
        files: list[Path] = []
        for path in arguments.files:
            entries = (
                [item for item in path.iterdir() if item.is_file()] if path.is_dir() else [path]
            )
            files += sorted(entries)
        devices: dict[str, Device] = {}
        for path in files:
            name = arguments.name if arguments.name is not None and len(files) == 1 else path.name
            if name in devices:
                raise ValueError(f"two files have the name {name!r}")
            devices[name] = self._device(path, name)
        if not devices:
            raise ValueError("no file to serve")
        self.exports = StaticExports(devices, listed=not arguments.no_list)

    def _device(self, path: Path, name: str) -> Device:
        arguments = self._arguments
        base = FileDevice(path, read_only=not arguments.writable or arguments.overlay is not None)
        self._open.insert(0, base)
        device: Device = base
        if arguments.overlay is not None:
            directory = arguments.overlay / (name.replace("/", "_") or "default")
            if not (directory / "journal").exists():
                OverlayDevice.create(directory, base=base, identity=_identity(path))
            device = OverlayDevice.open(
                directory, base=base, identity=_identity(path), quota_bytes=arguments.quota
            )
            self._open.insert(0, device)
        if arguments.faults is not None:
            device = FaultyDevice(device, arguments.faults)
        return device

    async def suspend(self) -> None:
        """Let a successor open what only one process may have open."""
        for device in self._open:
            if isinstance(device, OverlayDevice):
                await device.suspend()

    async def resume(self) -> None:
        """The successor failed: go on. Raises OverlayError."""
        for device in self._open:
            if isinstance(device, OverlayDevice):
                await device.resume()

    async def close(self) -> None:
        """Close all."""
        while self._open:
            await self._open.pop(0).close()


async def _serve(arguments: argparse.Namespace) -> None:
    policy = tls_policy(arguments.tls, arguments.cert, arguments.key, arguments.client_ca)
    server = Server(tls=policy)
    disks = _Disks(arguments)
    if arguments.take_over is None:
        disks.open()
        _listen(server, arguments, disks)
    else:
        await _take(server, arguments, disks)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    control = None
    if arguments.control is not None:
        control = _Control(server, disks, stop)
        await control.listen(arguments.control)
    if arguments.stdio:
        waiting = asyncio.create_task(server.wait_idle())
        waiting.add_done_callback(lambda _task: stop.set())
    await stop.wait()
    if control is not None:
        control.close()
    await server.drain()
    await disks.close()


def _listen(server: Server, arguments: argparse.Namespace, disks: _Disks) -> None:
    activated = activated_sockets(os.environ)
    for name, sock in activated:
        server.listen_socket(sock, disks.exports, label=name or None)
    if arguments.stdio:
        server.serve_pipes(os.dup(0), os.dup(1), disks.exports)
    if arguments.unix is not None:
        server.listen_unix(arguments.unix, disks.exports)
    alone = not (activated or arguments.stdio or arguments.unix)
    if arguments.port is not None or alone:
        server.listen_tcp(arguments.host, arguments.port or DEFAULT_PORT, disks.exports)


class _Control:
    """The socket on which a successor asks for all clients."""

    def __init__(self, server: Server, disks: _Disks, stop: asyncio.Event) -> None:
        self._server, self._disks, self._stop = server, disks, stop
        self._socket = socket.socket(socket.AF_UNIX)
        self._path: Path | None = None
        self._task: asyncio.Task[None] | None = None

    async def listen(self, path: Path) -> None:
        """Wait for one successor at a time."""
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(path.unlink)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        await asyncio.to_thread(path.chmod, 0o600)
        self._socket.listen(1)
        self._path = path
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            successor, _address = await loop.sock_accept(self._socket)
            with successor:
                try:
                    count = await hand_over(
                        self._server,
                        successor,
                        on_held=self._disks.suspend,
                        on_failure=self._disks.resume,
                    )
                except HandoverError as failure:
                    _log.warning("%s", failure)
                    continue
                _log.info("handed over %d clients", count)
                self._path = None  # The successor may listen there already.
                self._stop.set()
                return

    def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
        self._socket.close()


async def _take(server: Server, arguments: argparse.Namespace, disks: _Disks) -> None:
    with socket.socket(socket.AF_UNIX) as control:
        await asyncio.to_thread(control.connect, str(arguments.take_over))
        opened = False

        def exports_for(_label: str) -> StaticExports:
            nonlocal opened
            if not opened:
                disks.open()
                opened = True
            return disks.exports

        await take_over(server, control, exports_for)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(arguments))
    except (OSError, ValueError, OverlayError, HandoverError) as failure:
        sys.stderr.write(f"nbdserver: {failure}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
