"""Attaching an export to the Linux kernel as /dev/nbdN: connect, keep connected, detach, reclaim.

It uses netlink only. An Attachment owns the watch over its device; the kernel owns the sockets that
it was given. Devices are marked with a backend identifier, so that a later process can find them.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nbdserver import netlink
from nbdserver.protocol.client import ClientHandshake, ServerExport
from nbdserver.protocol.constants import ExportFlag
from nbdserver.protocol.errors import ProtocolViolation
from nbdserver.uri import NbdUri

_log = logging.getLogger(__name__)
_NETLINK_GENERIC = 16
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_REPLY_SECONDS = 10.0
_RETRY_SECONDS = 0.25
_SECTOR = 512


class AttachError(Exception):
    """The device could not be attached, found or detached; the message says which and why."""


class _Kernel:
    """One netlink socket, used blocking, by one thread at a time."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        self._sequence = 0
        try:
            self._socket.settimeout(_REPLY_SECONDS)
            self._socket.bind((0, 0))
            answers = self._ask(netlink.encode_find_family(self._next()))
            self.family = netlink.family_of(answers[0])
        except netlink.NetlinkError as failure:
            self._socket.close()
            raise AttachError(
                "the kernel offers no nbd devices (is the nbd module loaded?)"
            ) from failure
        except BaseException:
            self._socket.close()
            raise

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _ask(self, message: bytes) -> list[netlink.Message]:
        """Send a request; the answers before its acknowledgement. Raises NetlinkError, OSError."""
        self._socket.send(message)
        answers: list[netlink.Message] = []
        while True:
            for answer in netlink.decode(self._socket.recv(65536)):
                if answer.sequence != self._sequence:
                    continue
                if answer.error is None:
                    answers.append(answer)
                elif answer.error:
                    text = netlink.describe(answer.error)
                    raise netlink.NetlinkError(f"the kernel refuses: {text}", answer.error)
                else:
                    return answers

    def connect(self, **arguments: object) -> int:
        """CONNECT; the device's index."""
        message = netlink.encode_connect(self.family.number, self._next(), **arguments)  # type: ignore[arg-type]  # checked by attach()
        answers = self._ask(message)
        if not answers:
            raise AttachError("the kernel did not name the device")
        return netlink.index_of(answers[0])

    def reconfigure(self, index: int, fds: list[int], identifier: str) -> None:
        """RECONFIGURE."""
        self._ask(
            netlink.encode_reconfigure(
                self.family.number, self._next(), index=index, fds=fds, identifier=identifier
            )
        )

    def disconnect(self, index: int) -> None:
        """DISCONNECT."""
        self._ask(netlink.encode_disconnect(self.family.number, self._next(), index=index))

    def status(self) -> list[netlink.DeviceStatus]:
        """STATUS."""
        answers = self._ask(netlink.encode_status(self.family.number, self._next()))
        return [status for answer in answers for status in netlink.statuses_of(answer)]

    def subscribe(self) -> socket.socket:
        """A socket that receives LINK_DEAD messages."""
        if self.family.group is None:
            raise AttachError("this kernel does not tell when an nbd connection dies")
        watch = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_GENERIC)
        watch.bind((0, 0))
        watch.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, self.family.group)
        watch.setblocking(False)
        return watch

    def close(self) -> None:
        """Close."""
        self._socket.close()


@dataclass(frozen=True)
class AttachedDevice:
    """A device that the kernel has now: `path` is /dev/nbdN."""

    index: int
    identifier: str

    @property
    def path(self) -> Path:
        """The device node."""
        return Path(f"/dev/nbd{self.index}")


class Attachment:
    """One attached device. `keep` watches it and reconnects; `detach` ends it."""

    def __init__(
        self, kernel: _Kernel, uri: NbdUri, device: AttachedDevice, export: ServerExport
    ) -> None:
        self.device = device
        self.export = export
        self._kernel = kernel
        self._uri = uri
        self._lock = asyncio.Lock()

    async def keep(self) -> None:
        """Reconnect whenever a connection dies, until cancelled. Raises AttachError.

        Requests wait in the kernel meanwhile, as long as `dead_seconds` of `attach` allows. An
        export that came back with another size or other features is not connected to.
        """
        watch = await asyncio.to_thread(self._kernel.subscribe)
        loop = asyncio.get_running_loop()
        with watch:
            while True:
                data = await loop.sock_recv(watch, 65536)
                dead = 0
                for message in netlink.decode(data):
                    if message.command == netlink.NbdCommand.LINK_DEAD:
                        dead += netlink.index_of(message) == self.device.index
                for _ in range(dead):
                    await self._reconnect()

    async def _reconnect(self) -> None:
        while True:
            try:
                sock, export = await connect_client(self._uri)
            except (OSError, LookupError, ProtocolViolation) as failure:
                _log.info("reconnecting %s: %s", self.device.path, failure)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            with sock:
                if (export.size, export.flags) != (self.export.size, self.export.flags):
                    raise AttachError(f"the export behind {self.device.path} has changed")
                async with self._lock:
                    fds = [sock.fileno()]
                    index, name = self.device.index, self.device.identifier
                    await asyncio.to_thread(self._kernel.reconfigure, index, fds, name)
            return

    async def detach(self) -> None:
        """Disconnect the device (what was written is flushed by whoever unmounted it before)."""
        async with self._lock:
            await asyncio.to_thread(self._kernel.disconnect, self.device.index)

    def close(self) -> None:
        """Let go of netlink; the device stays attached."""
        self._kernel.close()


async def attach(
    uri: NbdUri,
    *,
    connections: int = 1,
    index: int | None = None,
    identifier: str,
    timeout_seconds: int = 0,
    dead_seconds: int = 60,
) -> Attachment:
    """Attach an export. Raises AttachError, OSError, LookupError (no such export).

    `identifier` marks the device for `attached_devices`; requests wait `dead_seconds` for a
    reconnection instead of failing.
    """
    sockets: list[socket.socket] = []
    kernel = None
    try:
        kernel = await asyncio.to_thread(_Kernel)
        exports: list[ServerExport] = []
        for _ in range(connections):
            sock, export = await connect_client(uri)
            sockets.append(sock)
            exports.append(export)
        export = exports[0]
        if any(other != export for other in exports):
            raise AttachError("the export changed while it was being attached")
        if connections > 1 and not export.flags & ExportFlag.CAN_MULTI_CONN:
            raise AttachError("this export does not allow several connections")
        number = await asyncio.to_thread(
            kernel.connect,
            fds=[sock.fileno() for sock in sockets],
            size=export.size,
            block_size=kernel_block_size(export),
            server_flags=export.flags,
            identifier=identifier,
            index=index,
            timeout_seconds=timeout_seconds,
            dead_seconds=dead_seconds,
        )
        return Attachment(kernel, uri, AttachedDevice(number, identifier), export)
    except netlink.NetlinkError as failure:
        if kernel is not None:
            kernel.close()
        raise AttachError(str(failure)) from failure
    except BaseException:
        if kernel is not None:
            kernel.close()
        raise
    finally:
        # The kernel holds its own references to the sockets it took.
        for sock in sockets:
            sock.close()


def kernel_block_size(export: ServerExport) -> int:
    """The logical block size for the kernel: 512 to 4096 bytes, whatever divides the size.

    Raises AttachError where the export's end could not be reached.
    """
    size = 4096
    while size > 512 and (export.size % size or size < export.minimum):
        size //= 2
    if export.size % size or export.minimum > size:
        raise AttachError(f"an export of {export.size} bytes cannot be a block device")
    return size


async def connect_client(uri: NbdUri) -> tuple[socket.socket, ServerExport]:
    """A blocking socket in transmission. Raises OSError, LookupError, ProtocolViolation."""
    return await asyncio.to_thread(_connect_now, uri)


def _connect_now(uri: NbdUri) -> tuple[socket.socket, ServerExport]:
    if uri.tls:
        raise ProtocolViolation("the kernel cannot be given a TLS connection")
    if uri.unix is not None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: str | tuple[str, int] = str(uri.unix)
    else:
        family = socket.AF_INET6 if ":" in (uri.host or "") else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        address = (uri.host or "localhost", uri.port)
    try:
        sock.settimeout(_REPLY_SECONDS)
        sock.connect(address)
        machine = ClientHandshake(uri.export)
        while machine.export is None:
            data = sock.recv(65536)
            if not data:
                raise ConnectionResetError("the server closed the handshake")
            sock.sendall(machine.receive(data))
        sock.settimeout(None)
        return sock, machine.export
    except BaseException:
        sock.close()
        raise


async def attached_devices(*, sysfs: Path = Path("/sys/block")) -> list[AttachedDevice]:
    """All connected nbd devices that carry a backend identifier. Raises AttachError, OSError."""
    kernel = await asyncio.to_thread(_Kernel)
    try:
        statuses = await asyncio.to_thread(kernel.status)
    except netlink.NetlinkError as failure:
        raise AttachError(str(failure)) from failure
    finally:
        kernel.close()
    return await asyncio.to_thread(_identified, statuses, sysfs)


def _identified(statuses: Iterable[netlink.DeviceStatus], sysfs: Path) -> list[AttachedDevice]:
    found = []
    for status in statuses:
        if not status.connected:
            continue
        with contextlib.suppress(OSError):
            text = (sysfs / f"nbd{status.index}" / "backend").read_text().strip()
            if text:
                found.append(AttachedDevice(status.index, text))
    return found


async def detach_device(index: int) -> None:
    """Disconnect /dev/nbdN, whoever attached it (a stale one too). Raises AttachError, OSError."""
    kernel = await asyncio.to_thread(_Kernel)
    try:
        await asyncio.to_thread(kernel.disconnect, index)
    except netlink.NetlinkError as failure:
        raise AttachError(str(failure)) from failure
    finally:
        kernel.close()


async def adopt(uri: NbdUri, device: AttachedDevice) -> Attachment:
    """Take up the watch over a device that an earlier process attached; dead links are renewed.

    Raises AttachError when the export no longer fits the device, OSError, LookupError.
    """
    kernel = await asyncio.to_thread(_Kernel)
    try:
        sock, export = await connect_client(uri)
        with sock:
            size = await asyncio.to_thread(_size_of, device)
            if size != export.size:
                raise AttachError(f"{device.path} has {size} bytes, the export {export.size}")
            fds = [sock.fileno()]
            # Where no link is dead the kernel ignores the socket, and it is closed here again.
            await asyncio.to_thread(kernel.reconfigure, device.index, fds, device.identifier)
        return Attachment(kernel, uri, device, export)
    except netlink.NetlinkError as failure:
        kernel.close()
        raise AttachError(str(failure)) from failure
    except BaseException:
        kernel.close()
        raise


def _size_of(device: AttachedDevice) -> int:
    """From sysfs: to open a device whose links are dead may wait for its partition table."""
    text = Path(f"/sys/block/nbd{device.index}/size").read_text()
    return int(text) * _SECTOR
