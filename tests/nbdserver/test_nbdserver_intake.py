"""Large writes go to the device in pieces as they arrive, and the stream stays in step."""

import errno
import random
import time

import pytest
from kits.nbd_client import ENOSPC, WRITE, RawClient
from kits.nbd_server import MemoryDevice, ServerThread, pattern

from nbdserver.device import DeviceError
from nbdserver.overlay import OverlayDevice

BLOCK = 4096
SIZE = 2 << 20
SIZES = (300_000, 400 << 10, 64 << 10)
FRAMINGS = [{}, {"structured": True}, {"extended": True}]


class PieceDevice(MemoryDevice):
    """Remembers pieces; `takes` says by their count whether, and from byte `full` on it fails."""

    def __init__(self, size, *, takes=lambda _count: True, full=None):
        super().__init__(size)
        self.pieces = []
        self.takes, self.full = takes, full

    def try_write(self, offset, payload):
        if self.full is not None and offset + len(payload) > self.full:
            raise DeviceError(errno.ENOSPC)
        self.pieces.append((offset, len(payload)))
        return self.takes(len(self.pieces)) and super().try_write(offset, payload)

    async def write(self, offset, payload, *, fua):
        if self.full is not None and offset + len(payload) > self.full:
            raise DeviceError(errno.ENOSPC)
        await super().write(offset, payload, fua=fua)


def send_in_pieces(client, data, rng):
    """With moments between, so that the server sees each by itself."""
    at = 0
    while at < len(data):
        step = rng.choice((1, 27, 100, 5000, 70_000, 200_000))
        client.send(data[at : at + step])
        at += step
        if rng.random() < 0.4:
            time.sleep(0.002)


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("offset", [0, 5 * BLOCK, 777])
@pytest.mark.parametrize("seed", range(3))
def test_any_pieces(tmp_path, framing, offset, seed):
    """However a write arrives and whichever pieces the device takes: its bytes, one answer."""
    rng = random.Random(seed)
    device = PieceDevice(SIZE, takes=(lambda _: True, lambda n: n % 3, lambda n: n < 2)[seed])
    with ServerThread(tmp_path / "s", device) as running, RawClient(running.path) as client:
        client.greet().go(**framing)
        model = bytearray(pattern(0, SIZE))
        for _ in range(3):
            body = rng.randbytes(rng.choice(SIZES))
            write = client.pack(WRITE, offset, len(body), payload=body)
            cookie = client.last
            send_in_pieces(client, write, rng)
            reply = client.reply()
            assert (reply.cookie, reply.error) == (cookie, 0)
            model[offset : offset + len(body)] = body
            assert client.read(0, SIZE) == model
        if seed == 0:
            ends = [first + length for first, length in device.pieces]
            assert len(ends) > 3
            assert all(end % BLOCK == 0 or end - offset in SIZES for end in ends)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_full_in_the_middle(tmp_path, framing):
    """F29: the disk is full after some pieces: ENOSPC, once, and the next request is understood."""
    device = PieceDevice(SIZE, full=300_000)
    with ServerThread(tmp_path / "s", device) as running, RawClient(running.path) as client:
        client.greet().go(**framing)
        for _ in range(3):
            body = bytes(1 << 20)
            send_in_pieces(client, client.pack(WRITE, 0, len(body), payload=body), random.Random(1))
            assert client.reply().error == ENOSPC
            assert client.read(1 << 20, BLOCK) == pattern(1 << 20, BLOCK)


def test_overlay_in_pieces(tmp_path):
    """An overlay over a slow base: fresh blocks, parts of blocks and its quota, in pieces."""
    base = MemoryDevice(SIZE, hits=False)
    OverlayDevice.create(tmp_path / "o", base=base, identity=b"b")
    device = OverlayDevice.open(tmp_path / "o", base=base, identity=b"b", quota_bytes=256 * BLOCK)
    rng = random.Random(5)
    with ServerThread(tmp_path / "s", device) as running, RawClient(running.path) as client:
        client.greet().go()
        model = bytearray(base.data)
        for offset, length in ((0, 100 * BLOCK), (50 * BLOCK, 400_000), (777, 600_000)):
            body = rng.randbytes(length)
            send_in_pieces(client, client.pack(WRITE, offset, length, payload=body), rng)
            assert client.reply().error == 0
            model[offset : offset + length] = body
            assert client.read(0, SIZE) == model
        body = rng.randbytes(1 << 20)
        send_in_pieces(client, client.pack(WRITE, 1 << 20, 1 << 20, payload=body), rng)
        assert client.reply().error == ENOSPC
        assert client.read(0, 1 << 20) == model[: 1 << 20]
        assert client.ask(WRITE, 0, BLOCK, payload=body[:BLOCK]).error == 0
        running.call(device.close())
