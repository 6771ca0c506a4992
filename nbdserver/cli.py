"""The `nbdserver` command: serve files from the command line."""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path

from nbdserver.device import Device
from nbdserver.exports import StaticExports
from nbdserver.filedevice import FileDevice
from nbdserver.server import Server


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nbdserver", description="Serve files as network block devices."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE|DIR")
    parser.add_argument("-U", "--unix", type=Path, help="listen on this unix socket")
    parser.add_argument("-i", "--host", default="127.0.0.1", help="TCP address to listen on")
    parser.add_argument("-p", "--port", type=int, help="TCP port (default: 10809 without --unix)")
    parser.add_argument("-w", "--writable", action="store_true", help="allow writes to the files")
    parser.add_argument("-e", "--name", help="export name (for a single file)")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what clients do wrong")
    return parser


def _devices(arguments: argparse.Namespace) -> dict[str, Device]:
    files: list[Path] = []
    for path in arguments.files:
        if path.is_dir():
            files += sorted(entry for entry in path.iterdir() if entry.is_file())
        else:
            files.append(path)
    devices: dict[str, Device] = {}
    for path in files:
        name = arguments.name if arguments.name is not None and len(files) == 1 else path.name
        if name in devices:
            raise SystemExit(f"nbdserver: two files have the name {name!r}")
        devices[name] = FileDevice(path, read_only=not arguments.writable)
    if not devices:
        raise SystemExit("nbdserver: no file to serve")
    return devices


async def _serve(arguments: argparse.Namespace) -> None:
    exports = StaticExports(_devices(arguments))
    server = Server()
    if arguments.unix is not None:
        server.listen_unix(arguments.unix, exports)
    if arguments.port is not None or arguments.unix is None:
        server.listen_tcp(arguments.host, arguments.port or 10809, exports)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
    await server.drain()
    await exports.close()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(arguments))
    except OSError as failure:
        sys.stderr.write(f"nbdserver: {failure}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
