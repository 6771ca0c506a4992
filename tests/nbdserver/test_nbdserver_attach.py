"""Kernel attach: the messages, the client's handshake, and what this host's kernel can answer."""

import asyncio
import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kits.nbd_client import READ, RawClient
from kits.nbd_server import MemoryDevice, ServerThread, pattern
from kits.until import until

from nbdserver import attach, netlink
from nbdserver.netlink import NbdAttribute, NbdCommand, NetlinkError
from nbdserver.protocol.client import ClientHandshake, ServerExport
from nbdserver.protocol.errors import ProtocolViolation
from nbdserver.uri import NbdUri


def attributes_of(message):
    (found,) = netlink.decode(message)
    return found


@pytest.mark.quick
def test_connect_message():
    """CONNECT carries sizes as u64, the index and sockets as u32, the sockets doubly nested."""
    raw = netlink.encode_connect(
        30,
        7,
        fds=[5, 6],
        size=1 << 33,
        block_size=4096,
        server_flags=0x105,
        identifier="cube/1",
        index=3,
        timeout_seconds=0,
        dead_seconds=60,
    )
    length, family, flags, sequence, port, command, version = struct.unpack_from("=IHHIIBB", raw)
    assert (length, family, flags, sequence, port) == (len(raw), 30, 5, 7, 0)
    assert (command, version) == (NbdCommand.CONNECT, 1)
    found = attributes_of(raw).attributes
    assert found[NbdAttribute.INDEX] == struct.pack("=I", 3)
    assert found[NbdAttribute.SIZE_BYTES] == struct.pack("=Q", 1 << 33)
    assert found[NbdAttribute.BLOCK_SIZE_BYTES] == struct.pack("=Q", 4096)
    assert found[NbdAttribute.SERVER_FLAGS] == struct.pack("=Q", 0x105)
    assert found[NbdAttribute.DEAD_CONN_TIMEOUT] == struct.pack("=Q", 60)
    assert NbdAttribute.TIMEOUT not in found
    assert found[NbdAttribute.BACKEND_IDENTIFIER] == b"cube/1\0"
    item = struct.pack("=HHHHI", 12, 0x8001, 8, 1, 5) + struct.pack("=HHHHI", 12, 0x8001, 8, 1, 6)
    assert found[NbdAttribute.SOCKETS] == item


@pytest.mark.quick
def test_other_messages():
    """RECONFIGURE, DISCONNECT, STATUS, and a search for the family."""
    message = attributes_of(netlink.encode_reconfigure(30, 1, index=2, fds=[9], identifier="x"))
    assert message.command == NbdCommand.RECONFIGURE and netlink.index_of(message) == 2
    assert netlink.index_of(attributes_of(netlink.encode_disconnect(30, 1, index=4))) == 4
    assert attributes_of(netlink.encode_status(30, 1)).attributes == {}
    found = attributes_of(netlink.encode_find_family(1))
    assert found.family == 16 and found.attributes == {2: b"nbd\0"}
    with pytest.raises(NetlinkError):
        netlink.index_of(attributes_of(netlink.encode_status(30, 1)))


@pytest.mark.quick
def test_status_answer():
    """A STATUS answer names devices and whether they are connected."""

    def device(index, connected):
        body = struct.pack("=HHI", 8, 1, index) + struct.pack("=HHB3x", 5, 2, connected)
        return struct.pack("=HH", 4 + len(body), 1) + body

    devices = device(0, 0) + device(1, 1)
    attributes = struct.pack("=HH", 4 + len(devices), 9) + devices
    body = struct.pack("=BBxx", NbdCommand.STATUS, 1) + attributes
    raw = struct.pack("=IHHII", 16 + len(body), 30, 0, 1, 0) + body
    acknowledgement = struct.pack("=IHHIIi16x", 36, 2, 0, 1, 0, 0)
    answer, end = netlink.decode(raw + acknowledgement)
    assert [(s.index, s.connected) for s in netlink.statuses_of(answer)] == [(0, False), (1, True)]
    assert end.error == 0
    (refusal,) = netlink.decode(struct.pack("=IHHIIi16x", 36, 2, 0, 1, 0, -22))
    assert refusal.error == 22


@pytest.mark.quick
@given(st.binary(max_size=200))
def test_any_datagram(raw):
    """Whatever a datagram holds, it is messages or a NetlinkError."""
    try:
        for message in netlink.decode(raw):
            netlink.statuses_of(message)
    except NetlinkError:
        pass


def test_this_kernels_controller(monkeypatch):
    """The running kernel's controller understands us (asked for a family it always has)."""
    monkeypatch.setattr(netlink, "FAMILY", "nlctrl")
    kernel = attach._Kernel()
    assert kernel.family.number == 16
    kernel.close()


async def test_kernel_without_nbd(tmp_path, monkeypatch):
    """Where the kernel has no such family, the error says so and nothing leaks."""
    monkeypatch.setattr(netlink, "FAMILY", "no-such-nbd")
    with pytest.raises(attach.AttachError, match="nbd module"):
        await attach.attach(NbdUri(unix=tmp_path / "x"), identifier="test")
    with pytest.raises(attach.AttachError):
        await attach.attached_devices()
    with pytest.raises(attach.AttachError):
        await attach.detach_device(0)


@pytest.mark.quick
def test_kernel_block_size():
    """The largest block of up to 4096 that divides the size and that the server can address."""
    size = attach.kernel_block_size
    assert size(ServerExport(1 << 30, 1)) == 4096
    assert size(ServerExport((1 << 30) + 512, 1)) == 512
    assert size(ServerExport((1 << 30) + 1024, 1, minimum=1024)) == 1024
    for export in (ServerExport(1000, 1), ServerExport((1 << 30) + 512, 1, minimum=4096)):
        with pytest.raises(attach.AttachError):
            size(export)


def test_client_handshake(tmp_path):
    """The client's half gets a socket into transmission that the kernel could use."""
    disk = MemoryDevice()
    with ServerThread(tmp_path / "s", disk) as running:
        uri = NbdUri("disk", unix=running.path)
        sock, export = asyncio.run(attach.connect_client(uri))
        assert export.size == disk.size and export.flags & 1 << 8
        with RawClient(sock) as client:
            assert client.ask(READ, 512, 512).data == pattern(512, 512)
        with pytest.raises(LookupError, match="no such export"):
            asyncio.run(attach.connect_client(NbdUri("other", unix=running.path)))


@pytest.mark.quick
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_client_handshake_by_transcript(step):
    """Split anywhere, the same outcome; nonsense is a violation."""
    export = struct.pack(">QIIIHQH", 0x0003E889045565A9, 7, 3, 12, 0, 4096, 1)
    sizes = struct.pack(">QIIIHIII", 0x0003E889045565A9, 7, 3, 14, 3, 512, 4096, 65536)
    finish = struct.pack(">QIII", 0x0003E889045565A9, 7, 1, 0)
    script = b"NBDMAGICIHAVEOPT\0\3" + export + sizes + finish
    machine = ClientHandshake("x")
    sent = b"".join(machine.receive(script[at : at + step]) for at in range(0, len(script), step))
    assert sent.startswith(b"\0\0\0\1IHAVEOPT\0\0\0\7")
    assert machine.export == ServerExport(4096, 1, 512, 4096, 65536)
    for junk in (
        b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\3",
        b"NBDMAGICIHAVEOPT\0\0",
        b"NBDMAGICIHAVEOPT\0\3" + finish,
        b"NBDMAGICIHAVEOPT\0\3" + bytes(20),
    ):
        with pytest.raises(ProtocolViolation):
            ClientHandshake("x").receive(junk)


@pytest.mark.quick
async def test_identified_devices(tmp_path):
    """Only connected devices with an identifier are found."""
    for index, text in ((0, "ours/a\n"), (1, "ours/b\n"), (2, None), (3, "\n")):
        folder = tmp_path / f"nbd{index}"
        folder.mkdir()
        if text:
            (folder / "backend").write_text(text)
    statuses = [netlink.DeviceStatus(index, index != 1) for index in range(4)]
    found = attach._identified(statuses, tmp_path)
    assert [(str(device.path), device.identifier) for device in found] == [("/dev/nbd0", "ours/a")]


class FakeKernel:
    """Stands in for netlink where the kernel has no nbd: remembers what it was asked."""

    def __init__(self, reader):
        self.reader, self.fds, self.calls = reader, [], []

    def connect(self, *, fds, **arguments):
        self.fds = [socket.socket(fileno=os.dup(fd)) for fd in fds]
        self.calls.append(arguments)
        return 5

    def subscribe(self):
        return self.reader

    def reconfigure(self, index, fds, identifier):
        self.calls.append((index, identifier))
        self.fds += [socket.socket(fileno=os.dup(fd)) for fd in fds]

    def close(self):
        for sock in self.fds:
            sock.close()


async def test_attach_and_reconnect(tmp_path, monkeypatch):
    """Connections are given to the kernel; a dead one is replaced when the server is back."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    kernel = FakeKernel(ours)
    monkeypatch.setattr(attach, "_Kernel", lambda: kernel)
    uri = NbdUri("disk", unix=tmp_path / "s")
    disk = MemoryDevice()
    with ServerThread(tmp_path / "s", disk):
        attachment = await attach.attach(uri, connections=3, identifier="t/1", dead_seconds=9)
        assert attachment.device.path.name == "nbd5" and len(kernel.fds) == 3
        assert kernel.calls[0]["size"] == disk.size and kernel.calls[0]["dead_seconds"] == 9
    keeper = asyncio.create_task(attachment.keep())
    attribute = struct.pack("=HHI", 8, 1, 5)
    dead = netlink.encode(30, NbdCommand.LINK_DEAD, 0, attribute)
    theirs.sendall(dead)
    await asyncio.sleep(0.05)
    assert len(kernel.calls) == 1
    with ServerThread(tmp_path / "s", disk):
        await until(lambda: len(kernel.calls) >= 2, "the second connection")
        assert kernel.calls[1] == (5, "t/1")
        kernel.fds[-1].settimeout(10)
        with RawClient(kernel.fds[-1]) as client:
            assert client.ask(READ, 0, 512).data == pattern(0, 512)
        # An export that came back changed is not connected to.
        disk.size *= 2
        theirs.sendall(dead)
        with pytest.raises(attach.AttachError, match="changed"):
            await asyncio.wait_for(keeper, 10)
    kernel.close()
    theirs.close()
