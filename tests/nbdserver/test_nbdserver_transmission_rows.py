"""Rows F1-F35 of the bad-input catalogue, on the wire, in all three framings."""

import asyncio
import errno
import socket
import struct
import threading
import time

import pytest
from kits.nbd_client import (
    ABORT,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EPERM,
    ERR_SHUTDOWN,
    ESHUTDOWN,
    EXPORT_NAME,
    FAST_ZERO,
    FLUSH,
    FUA,
    GO,
    LIST,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REP_ACK,
    REQ_ONE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    RawClient,
    go_body,
)
from kits.nbd_server import MemoryDevice, ServerThread, pattern

from nbdserver.limits import Limits

FRAMINGS = [{}, {"structured": True}, {"extended": True}]
FRAMING_IDS = ["simple", "structured", "extended"]
CONTEXTS = (b"base:allocation", b"x-test:parity")


@pytest.fixture(params=FRAMINGS, ids=FRAMING_IDS)
def client(connect, request):
    made = connect(go=True, **request.param)
    yield made
    # Whatever a test did, the connection is in step unless it is closed.
    if made.sock.fileno() >= 0:
        assert made.read(4096, 4096) == pattern(4096, 4096)


def test_reads_beyond_the_end(client):
    """F1, F2: a read past the end, or one whose end wraps 2^64: EINVAL, usable."""
    size = client.size
    for offset, length in (
        (size, 1),
        (size - 1, 2),
        (size - 4096, 8192),
        (2**64 - 1, 2),
        (2**64 - 4096, 4096),
        (2**63, 4096),
    ):
        assert client.ask(READ, offset, length).error == EINVAL
    assert client.read(size - 1, 1) == pattern(size - 1, 1)
    assert client.read(0, size) == pattern(0, size)


def test_unknown_commands_and_flags(client):
    """F3, F4: an unknown command or flag: EINVAL, usable."""
    for command in (8, 9, 77, 0xFFFF):
        assert client.ask(command, 0, 4096).error == EINVAL
    for flag in (0x40, 0x8000, NO_HOLE, REQ_ONE, FAST_ZERO):
        assert client.ask(READ, 0, 4096, flag).error == EINVAL
        assert client.ask(FLUSH, 0, 0, flag).error == EINVAL


def test_df(connect):
    """F5: DF without structured replies: EINVAL; with them it is advertised and works."""
    plain = connect(go=True)
    assert not plain.flags & 1 << 7
    assert plain.ask(READ, 0, 4096, DF).error == EINVAL
    assert plain.read(0, 8) == pattern(0, 8)
    structured = connect(structured=True)
    assert structured.flags & 1 << 7
    assert structured.ask(READ, 0, 65536, DF).data == pattern(0, 65536)


def test_empty_requests(client):
    """F6: length 0: EINVAL, usable."""
    for command in (READ, WRITE, TRIM, CACHE, ZEROES):
        assert client.ask(command, 0, 0).error == EINVAL


def test_too_long_reads(tmp_path):
    """F7, F8: a read of 4 GiB - 1, or above the advertised maximum: EINVAL, usable."""
    disk = MemoryDevice(1 << 20)
    disk.size = 8 << 30
    with ServerThread(tmp_path / "s", disk) as running, RawClient(running.path) as client:
        client.greet().go(infos=(3,))
        for length in (0xFFFFFFFF, (32 << 20) + 1):
            assert client.ask(READ, 0, length).error == EINVAL
        assert client.read(0, 8) == pattern(0, 8)


@pytest.mark.parametrize("framing", FRAMINGS, ids=FRAMING_IDS)
def test_write_to_read_only(tmp_path, framing):
    """F9: a write to a read-only export: EPERM, the payload is drained, usable."""
    disk = MemoryDevice(4 << 20, read_only=True)
    with ServerThread(tmp_path / "s", disk) as running, RawClient(running.path) as client:
        client.greet().go(**framing)
        assert client.flags & 2
        for size in (1, 4096, 3 << 20):
            assert client.ask(WRITE, 0, size, payload=b"x" * size).error == EPERM
        assert client.ask(TRIM, 0, 4096).error == EPERM
        assert client.ask(ZEROES, 0, 4096).error == EPERM
        assert client.read(0, 4096) == pattern(0, 4096)


def test_huge_write(connect):
    """F10: a write of 4 GiB - 1: an error, and close."""
    client = connect(go=True)
    client.send(client.pack(WRITE, 0, 0xFFFFFFFF))
    assert client.reply().error in (EINVAL, ENOSPC)
    client.expect_closed()
    # Up to 64 MiB are drained instead.
    client = connect(go=True)
    size = 33 << 20
    assert client.ask(WRITE, 0, size, payload=bytes(size)).error in (EINVAL, ENOSPC)
    assert client.read(0, 8) == pattern(0, 8)


def test_writes_past_the_end(client):
    """Writes past the end get ENOSPC as the document says, trims EINVAL."""
    size = client.size
    assert client.ask(WRITE, size - 2, 4, payload=b"abcd").error == ENOSPC
    assert client.ask(ZEROES, size - 2, 4).error == ENOSPC
    assert client.ask(TRIM, size - 2, 4).error == EINVAL
    assert client.ask(CACHE, size - 2, 4).error == EINVAL


def test_wrong_magic(connect):
    """F11: a wrong request magic: close, after what came before it was answered."""
    client = connect(go=True)
    client.send(client.pack(READ, 0, 8) + b"\x25\x60\x95\x14" + bytes(24))
    assert client.reply().data == pattern(0, 8)
    client.expect_closed()


def test_flush_with_a_range(client):
    """F12: FLUSH with a length or offset: EINVAL."""
    assert client.ask(FLUSH, 0, 1).error == EINVAL
    assert client.ask(FLUSH, 4096, 0).error == EINVAL
    assert client.ask(FLUSH).error == 0


def test_block_status_without_context(client):
    """F13, F14: BLOCK_STATUS without a context, also of 4 GiB - 1: EINVAL, usable."""
    assert client.ask(STATUS, 0, 4096).error == EINVAL
    assert client.ask(STATUS, 0, 0xFFFFFFFF).error == EINVAL


def test_client_gone(server, connect, device):
    """F15, F16: clients gone in mid-write or with replies pending: others are unaffected."""
    other = connect(go=True)
    gone = connect(go=True)
    gone.send(gone.pack(WRITE, 0, 1 << 20, payload=b"x" * 500_000))
    gone.close()
    gone = connect(go=True)
    server.do(lambda: setattr(device, "gate", asyncio.Event()))
    gone.send(b"".join(gone.pack(READ, 0, 4096) for _ in range(50)))
    wait_until(lambda: server.do(lambda: server.server._turn.waiting))
    gone.close()
    server.do(lambda: (device.gate.set(), setattr(device, "gate", None)))
    assert other.read(1 << 19, 4096) == pattern(1 << 19, 4096)
    wait_until(lambda: server.server.counters.connections == 1)
    assert device.pinned == 0 and server.server._turn.waiting == 0


@pytest.mark.parametrize("framing", FRAMINGS, ids=FRAMING_IDS)
@pytest.mark.parametrize("hits", [True, False])
def test_segmentation(connect, device, framing, hits):
    """F17, F18: 64 requests in one segment, and one request in 28 segments: the same answers."""
    device.hits = hits
    client = connect(go=True, **framing)
    batch = b"".join(client.pack(READ, index * 512, 4096) for index in range(64))
    first = int.from_bytes(client.last, "big") - 63
    client.send(batch)
    answers = {}
    for _ in range(64):
        reply = client.reply()
        answers[int.from_bytes(reply.cookie, "big") - first] = reply.data
    assert answers == {index: pattern(index * 512, 4096) for index in range(64)}
    for index in range(3):
        for byte in client.pack(READ, index * 512, 4096):
            client.send(bytes([byte]))
        assert client.reply().data == answers[index]


def test_client_that_never_reads(tmp_path):
    """F19: who reads no replies stalls only itself, is bounded, and is closed after a while."""
    disk = MemoryDevice(8 << 20)
    limits = Limits(stalled_seconds=0.5)
    with ServerThread(tmp_path / "s", disk, limits=limits) as running:
        with RawClient(running.path) as stuck, RawClient(running.path) as other:
            stuck.greet().go()
            other.greet().go()
            stuck.sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    stuck.sock.send(stuck.pack(READ, 0, 1 << 20))
            wait_until(lambda: running.do(lambda: disk.pinned) > 0)
            assert running.do(lambda: disk.pinned) <= 600
            assert other.read(0, 4096) == pattern(0, 4096)
            wait_until(lambda: running.server.counters.stalls == 1)
            wait_until(lambda: running.server.counters.connections == 1)
            assert running.do(lambda: disk.pinned) == 0
            assert other.read(0, 4096) == pattern(0, 4096)


@pytest.mark.parametrize("hits", [True, False])
def test_pipelined_flood(connect, device, hits):
    """F20: 100,000 pipelined requests: backpressure, every cookie answered with its bytes."""
    device.hits = hits
    count = 100_000 if hits else 20_000
    client = connect(go=True)
    requests = [
        struct.pack(">IHH8sQI", 0x25609513, 0, READ, index.to_bytes(8, "big"), index * 8 % 2**19, 8)
        for index in range(count)
    ]
    sending = threading.Thread(target=lambda: client.sock.sendall(b"".join(requests)))
    sending.start()
    seen = set()
    raw = client.recv(count * 24)
    sending.join(90)
    for magic, error, cookie, word in struct.iter_unpack(">IIQQ", raw):
        assert (magic, error) == (0x67446698, 0)
        assert word == cookie * 8 % 2**19 + 1
        seen.add(cookie)
    assert len(seen) == count


def test_duplicate_cookies(client, device):
    """F21: duplicate cookies in flight: both are answered."""
    device.hits = False
    same = b"cookies!"
    client.send(client.pack(READ, 0, 64, cookie=same) + client.pack(READ, 0, 64, cookie=same))
    client.reads[same] = 64
    assert client.reply().data == pattern(0, 64)
    client.reads[same] = 64
    assert client.reply().data == pattern(0, 64)


def test_disconnect_with_requests_in_flight(server, connect, device):
    """F22: DISC with requests in flight: they are finished, then the connection closes."""
    client = connect(go=True)
    server.do(lambda: setattr(device, "gate", asyncio.Event()))
    client.send(
        client.pack(READ, 0, 4096)
        + client.pack(WRITE, 8192, 8, payload=b"written!")
        + client.pack(DISC)
        + client.pack(READ, 0, 4096)
    )
    wait_until(lambda: server.do(lambda: server.server._turn.waiting) == 2)
    server.do(lambda: device.gate.set())
    replies = [client.reply(), client.reply()]
    assert sorted(len(reply.data) for reply in replies) == [0, 4096]
    client.expect_closed()
    assert device.data[8192:8200] == b"written!"


def test_reset_in_mid_reply(tmp_path, caplog):
    """F23: a reset in the middle of a reply leaves no traceback; others are unaffected."""
    disk = MemoryDevice(8 << 20)
    with ServerThread(tmp_path / "s", disk, listen=False) as running:
        listener = running.do(lambda: running.server.listen_tcp("127.0.0.1", 0, running.exports))
        address = listener.socket.getsockname()
        other = RawClient(socket.create_connection(address))
        other.greet().go()
        for _ in range(5):
            client = RawClient(socket.create_connection(address))
            client.greet().go()
            client.send(b"".join(client.pack(READ, 0, 8 << 20) for _ in range(8)))
            client.recv(1000)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        wait_until(lambda: running.server.counters.connections == 1)
        assert other.read(0, 4096) == pattern(0, 4096)
        assert running.do(lambda: disk.pinned) == 0
        other.close()
    assert "Traceback" not in caplog.text


def test_unadvertised_fua(tmp_path, connect):
    """F24: FUA where it is not advertised: EINVAL, usable; where it is, every command takes it."""
    disk = MemoryDevice(read_only=True)
    disk.can_fua = False
    with ServerThread(tmp_path / "ro", disk) as running, RawClient(running.path) as client:
        client.greet().go()
        assert not client.flags & 1 << 3
        assert client.ask(READ, 0, 4096, FUA).error == EINVAL
        assert client.read(0, 8) == pattern(0, 8)
    client = connect(go=True)
    assert client.ask(READ, 0, 4096, FUA).data == pattern(0, 4096)


@pytest.mark.parametrize("framing", FRAMINGS[1:], ids=FRAMING_IDS[1:])
def test_block_status(connect, framing):
    """F25: odd BLOCK_STATUS requests get legal extents: none empty, none past what was asked."""
    client = connect(contexts=CONTEXTS, **framing)
    size = client.size
    for offset, length, flags in (
        (size - 1, 1, 0),
        (0, size, 0),
        (0, size, REQ_ONE),
        (65535, 2, 0),
        (1, 65535, REQ_ONE),
        (12345, 300_000, 0),
    ):
        reply = client.ask(STATUS, offset, length, flags)
        assert reply.error == 0 and set(reply.extents) == {1, 2}
        for number, extents in reply.extents.items():
            assert all(count > 0 for count, _ in extents)
            assert sum(count for count, _ in extents) <= length
            assert not flags & REQ_ONE or len(extents) == 1
            assert extents[0][1] == offset // 65536 % 2 * (3 if number == 1 else 7)
    for offset, length in ((size - 1, 2), (size, 1), (0, 0), (0, 0xFFFFFFFF), (2**64 - 1, 1)):
        assert client.ask(STATUS, offset, length).error == EINVAL
    assert client.read(0, 8) == pattern(0, 8)


def test_block_status_payload(connect):
    """BLOCK_STATUS's payload form: a subset of contexts; anything odd is drained and EINVAL."""
    client = connect(extended=True, contexts=CONTEXTS)
    assert client.flags & 1 << 12

    def ask(body):
        return client.ask(STATUS, 0, len(body), PAYLOAD_LEN, payload=body)

    reply = ask(struct.pack(">QI", 4096, 2))
    assert reply.error == 0 and list(reply.extents) == [2]
    for body in (
        b"\0" * 7,
        struct.pack(">Q", 4096),
        struct.pack(">QI", 4096, 9),
        struct.pack(">QII", 4096, 1, 1),
        struct.pack(">QI", 1 << 40, 1),
        struct.pack(">QI", 0, 1),
        struct.pack(">QIH", 4096, 1, 1),
    ):
        assert ask(body).error == EINVAL
    assert client.ask(READ, 0, 16, PAYLOAD_LEN, payload=bytes(16)).error == EINVAL
    assert client.read(0, 8) == pattern(0, 8)
    client.send(client.pack(STATUS, 0, 1 << 40, PAYLOAD_LEN))
    assert client.reply().error == EINVAL
    client.expect_closed()


def test_zeroes(client, device):
    """F26: WRITE_ZEROES with its flags, longer than a payload may be; ENOTSUP if not fast."""
    assert client.ask(ZEROES, 0, 4096, NO_HOLE | FUA).error == 0
    assert client.read(0, 4096) == bytes(4096)
    assert client.ask(ZEROES, 65536, 4096, FAST_ZERO).error == 0
    assert client.ask(ZEROES, 0, 4096, FAST_ZERO | NO_HOLE).error == ENOTSUP
    assert client.ask(ZEROES, 0, 0xFFFFFFFF).error == ENOSPC


def test_trim_then_read(client):
    """F27: what was trimmed reads as zeros here."""
    assert client.ask(TRIM, 131072, 65536).error == 0
    assert client.read(131072, 65536) == bytes(65536)


def test_flush_is_seen_by_all(connect, device):
    """F28: multi-conn: what was written on one connection is read on another."""
    one, two = connect(go=True), connect(go=True)
    assert one.flags & 1 << 8
    assert one.ask(WRITE, 100, 5, payload=b"hello").error == 0
    assert one.ask(FLUSH).error == 0 and device.flushes == 1
    assert two.read(100, 5) == b"hello"
    assert two.ask(WRITE, 100, 5, FUA, payload=b"HELLO").error == 0 and device.flushes == 2
    assert one.read(100, 5) == b"HELLO"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space(server, client, device, number):
    """F29: a write without space: ENOSPC, and the export stays readable."""
    device.error = number
    assert client.ask(WRITE, 0, 8, payload=bytes(8)).error == ENOSPC
    device.error = 0


def test_origin_dead(client, device):
    """F30: a failed read is EIO, and the next one is tried afresh."""
    device.error = errno.EIO
    assert client.ask(READ, 0, 4096).error == EIO
    device.error = errno.ETIMEDOUT
    assert client.ask(READ, 0, 4096).error == EIO
    device.error = 0
    assert client.read(0, 4096) == pattern(0, 4096)


def test_device_that_never_answers(tmp_path):
    """F30: a device that does not answer in time: EIO."""
    disk = MemoryDevice()
    with ServerThread(tmp_path / "s", disk, limits=Limits(request_seconds=0.2)) as running:
        with RawClient(running.path) as client:
            client.greet().go(structured=True)
            running.do(lambda: setattr(disk, "gate", asyncio.Event()))
            assert client.ask(READ, 0, 4096).error == EIO
            running.do(lambda: setattr(disk, "gate", None))
            assert client.read(0, 4096) == pattern(0, 4096)


def test_device_with_a_bug(connect, device, caplog):
    """A device's exception is EIO for that request alone, and is logged."""

    async def broken(offset, length):
        raise ZeroDivisionError

    client = connect(go=True)
    device.hits = False
    device.read_copied = broken
    assert client.ask(READ, 0, 4096).error == EIO
    del device.read_copied
    assert client.read(0, 4096) == pattern(0, 4096)
    assert "ZeroDivisionError" in caplog.text


def test_cache(client, device):
    """F32: CACHE of everything is accepted, and bounded by the device."""
    assert client.flags & 1 << 10
    assert client.ask(CACHE, 0, client.size).error == 0
    assert device.cached == [(0, client.size)]


def test_extended_requests(connect):
    """F33: an extended header before negotiation: close; an offset of 2^63: EINVAL."""
    client = connect(go=True)
    client.send(struct.pack(">IHH8sQQ", 0x21E41C71, 0, READ, b"cookies!", 0, 8))
    client.expect_closed()
    client = connect(extended=True)
    assert client.ask(READ, 2**63, 8).error == EINVAL
    assert client.ask(TRIM, 0, 2**63).error == EINVAL
    assert client.ask(ZEROES, 0, 2**40).error == ENOSPC
    # A write without PAYLOAD_LEN has no payload on the wire.
    client.send(struct.pack(">IHH8sQQ", 0x21E41C71, 0, WRITE, b"cookies!", 0, 8))
    assert client.reply().error == EINVAL
    assert client.read(0, 8) == pattern(0, 8)
    # Above the advertised maximum a payload is not even drained.
    client.send(client.pack(WRITE, 0, (32 << 20) + 1))
    assert client.reply().error
    client.expect_closed()


@pytest.mark.parametrize("whole", [True, False])
def test_shutdown(server, connect, device, whole):
    """F34, F35: during shutdown, or when its export goes away: ESHUTDOWN, what runs is finished."""
    client = connect(go=True)
    server.do(lambda: setattr(device, "gate", asyncio.Event()))
    client.send(client.pack(READ, 0, 4096))
    wait_until(lambda: server.do(lambda: server.server._turn.waiting) == 1)
    ending = server.server.drain() if whole else server.server.withdraw(device)
    future = asyncio.run_coroutine_threadsafe(ending, server.loop)
    server.do(lambda: None)
    client.send(client.pack(READ, 4096, 4096) + client.pack(WRITE, 0, 4, payload=b"abcd"))
    assert [client.reply().error, client.reply().error] == [ESHUTDOWN, ESHUTDOWN]
    server.do(lambda: device.gate.set())
    assert client.reply().data == pattern(0, 4096)
    client.expect_closed()
    future.result(10)


def test_observed_batches(connect, device):
    """Reads are told to the device batch by batch, hits and misses."""
    client = connect(go=True)
    client.read(0, 4096)
    device.hits = False
    client.read(4096, 512)
    # The device is told after the answer has left.
    wait_until(lambda: device.observed == [(0, 4096, True), (4096, 512, False)])


def test_large_transfers(tmp_path):
    """32 MiB writes and reads, which stop and go on many times, keep their bytes and pins."""
    disk = MemoryDevice(1 << 20)
    disk.size = 40 << 20
    disk.data = bytearray(disk.size)
    with ServerThread(tmp_path / "s", disk) as running, RawClient(running.path) as client:
        client.greet().go()
        for quick in (True, False):
            disk.quick_writes = quick
            body = pattern(776, 1 << 20) * 32
            assert client.ask(WRITE, 4096, len(body), payload=body).error == 0
            for hits in (True, False):
                disk.hits = hits
                assert client.read(4096, len(body)) == body
            disk.data[:] = bytes(len(disk.data))
        wait_until(lambda: running.do(lambda: disk.pinned) == 0)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_options_during_shutdown(server, connect, device):
    """F34: options during shutdown get ERR_SHUTDOWN, but ABORT its ACK; EXPORT_NAME closes."""
    busy = connect(go=True)
    server.do(lambda: setattr(device, "gate", asyncio.Event()))
    busy.send(busy.pack(READ, 0, 4096))
    wait_until(lambda: server.do(lambda: server.server._turn.waiting) == 1)
    shaking, aborting, old = connect(), connect(), connect()
    wait_until(lambda: server.do(lambda: len(server.server._handshakes)) == 3)
    future = asyncio.run_coroutine_threadsafe(server.server.drain(), server.loop)
    server.do(lambda: None)
    assert shaking.verdict(LIST) == ERR_SHUTDOWN
    assert shaking.verdict(GO, go_body(b"disk")) == ERR_SHUTDOWN
    assert aborting.verdict(ABORT) == REP_ACK
    old.send_option(EXPORT_NAME, b"disk")
    old.expect_closed()
    server.do(lambda: device.gate.set())
    assert busy.reply().data == pattern(0, 4096)
    future.result(10)
