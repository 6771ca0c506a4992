"""The copy-on-write overlay: against a model, against dying, against the wrong base."""

import asyncio
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.nbd_client import ENOSPC, FLUSH, FUA, STATUS, TRIM, WRITE, ZEROES, Closed, RawClient
from kits.nbd_server import MemoryDevice, ServerThread, pattern

from nbdserver import journal
from nbdserver.device import BaseDevice, DeviceError
from nbdserver.filedevice import FileDevice
from nbdserver.overlay import OverlayDevice, OverlayError, list_overlays

BLOCK = 4096
SIZE = 64 * BLOCK


def make(path, base, size=None, **options):
    OverlayDevice.create(path, base=base, identity=b"base-1", size=size)
    return OverlayDevice.open(path, base=base, identity=b"base-1", **options)


def reopen(path, base, **options):
    return OverlayDevice.open(path, base=base, identity=b"base-1", **options)


async def contents(device):
    return await device.read_copied(0, device.size)


class HonestDevice(MemoryDevice):
    extents = BaseDevice.extents


operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "quick", "fua", "zero", "zero full", "trim", "flush", "reopen"]),
        st.integers(0, SIZE - 1),
        st.one_of(st.integers(1, 3 * BLOCK), st.sampled_from([BLOCK, 8 * BLOCK])),
        st.booleans(),
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None)
@given(operations=operations, odd_end=st.booleans(), hits=st.booleans())
def test_like_an_array(tmp_path_factory, operations, odd_end, hits):
    """Whatever is written, zeroed, trimmed and reopened reads as from an array of bytes."""

    async def run():
        path = tmp_path_factory.mktemp("overlay") / "o"
        size = SIZE - 1000 if odd_end else SIZE
        base = HonestDevice(size, read_only=True, hits=hits)
        model = bytearray(base.data)
        device = make(path, base)
        for index, (name, offset, length, aligned) in enumerate(operations):
            if aligned:
                offset -= offset % BLOCK
            offset %= size
            length = min(length, size - offset)
            payload = random.Random(index).randbytes(length)
            if name == "reopen":
                await device.close()
                device = reopen(path, base)
                continue
            if name == "flush":
                await device.flush()
            elif name == "quick" and device.try_write(offset, payload):
                model[offset : offset + length] = payload
            elif name in ("write", "fua", "quick"):
                await device.write(offset, payload, fua=name == "fua")
                model[offset : offset + length] = payload
            elif name.startswith("zero"):
                full = name == "zero full"
                await device.write_zeroes(offset, length, fua=False, no_hole=full, fast=False)
                model[offset : offset + length] = bytes(length)
            elif name == "trim":
                await device.trim(offset, length, fua=False)
                after = await device.read_copied(offset, length)
                assert set(zip(after, model[offset : offset + length], strict=True)) <= {
                    (new, old) for old in range(256) for new in (0, old)
                }
                model[offset : offset + length] = after
            buffers = await device.read(offset, length)
            assert b"".join(bytes(part) for part in buffers) == model[offset : offset + length]
        assert await contents(device) == model
        # What changes() tells, put onto the base, is the overlay.
        rebuilt = bytearray(base.data)
        last = 0
        async for change in device.changes(step=3 * BLOCK):
            assert change.offset >= last
            last = change.offset + change.length
            rebuilt[change.offset : last] = change.data or bytes(change.length)
        assert rebuilt == model
        total = 0
        for extent in await device.extents("base:allocation", 0, size, one=False):
            if extent.flags == 3:
                assert not any(model[total : total + extent.length])
            total += extent.length
        assert total == size
        await device.close()

    asyncio.run(run())


async def test_wrong_bases(tmp_path):
    """A base of another identity or size is refused, so is a second opening."""
    base = MemoryDevice(SIZE)
    device = make(tmp_path / "o", base)
    with pytest.raises(OverlayError, match="in use"):
        reopen(tmp_path / "o", base)
    await device.close()
    with pytest.raises(OverlayError, match="another base"):
        OverlayDevice.open(tmp_path / "o", base=base, identity=b"base-2")
    with pytest.raises(OverlayError, match="base of"):
        reopen(tmp_path / "o", MemoryDevice(SIZE * 2))
    with pytest.raises(OverlayError, match="no overlay"):
        reopen(tmp_path / "absent", base)
    with pytest.raises(FileExistsError):
        OverlayDevice.create(tmp_path / "o", base=base, identity=b"base-1")
    with pytest.raises(OverlayError):
        OverlayDevice.create(tmp_path / "p", base=base, identity=b"base-1", size=SIZE - BLOCK)
    (tmp_path / "o" / "data").unlink()
    with pytest.raises(OverlayError, match="data file"):
        reopen(tmp_path / "o", base)


@pytest.mark.parametrize("damage", range(0, 512, 37))
async def test_damaged_header(tmp_path, damage):
    """Any damaged byte of the header is noticed."""
    base = MemoryDevice(SIZE)
    OverlayDevice.create(tmp_path / "o", base=base, identity=b"base-1")
    path = tmp_path / "o" / "journal"
    raw = bytearray(path.read_bytes())
    raw[damage] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(OverlayError):
        reopen(tmp_path / "o", base)


async def test_grow_list_inspect(tmp_path):
    """An overlay that is not open can be listed, inspected and made larger."""
    base = MemoryDevice(SIZE)
    device = make(tmp_path / "o", base)
    await device.write(BLOCK, b"x" * BLOCK, fua=False)
    await device.trim(3 * BLOCK, 2 * BLOCK, fua=False)
    with pytest.raises(OverlayError):
        OverlayDevice.grow(tmp_path / "o", SIZE * 2)
    await device.close()
    OverlayDevice.grow(tmp_path / "o", SIZE * 2)
    with pytest.raises(OverlayError, match="shrink"):
        OverlayDevice.grow(tmp_path / "o", SIZE)
    facts = OverlayDevice.inspect(tmp_path / "o")
    assert (facts.size, facts.base_size, facts.identity) == (SIZE * 2, SIZE, b"base-1")
    assert facts.data_blocks == 1 and facts.zero_blocks == 2 + 64
    assert list_overlays(tmp_path) == [tmp_path / "o"]
    device = reopen(tmp_path / "o", base)
    assert device.size == SIZE * 2
    assert await device.read_copied(SIZE, SIZE) == bytes(SIZE)
    await device.write(SIZE * 2 - 100, b"y" * 100, fua=True)
    await device.close()
    device = reopen(tmp_path / "o", base)
    assert (await device.read_copied(SIZE * 2 - 101, 101)) == b"\0" + b"y" * 100
    await device.close()


@pytest.mark.parametrize("framing", [{}, {"structured": True}])
def test_quota(tmp_path, framing):
    """F29: above the quota: ENOSPC, the export stays readable, trimming makes room."""
    base = MemoryDevice(SIZE)
    device = make(tmp_path / "o", base, quota_bytes=8 * BLOCK)
    with ServerThread(tmp_path / "s", device) as running, RawClient(running.path) as client:
        client.greet().go(**framing)
        assert client.ask(WRITE, 0, 8 * BLOCK, payload=b"q" * 8 * BLOCK).error == 0
        assert client.ask(WRITE, 8 * BLOCK, BLOCK, payload=b"q" * BLOCK).error == ENOSPC
        assert client.ask(WRITE, 8 * BLOCK + 5, 7, payload=b"q" * 7).error == ENOSPC
        assert client.ask(ZEROES, 8 * BLOCK, BLOCK, 2).error == ENOSPC
        assert client.read(8 * BLOCK, BLOCK) == pattern(8 * BLOCK, BLOCK)
        assert client.ask(WRITE, 100, 5, payload=b"again").error == 0
        assert client.ask(TRIM, 0, BLOCK).error == 0
        assert client.ask(WRITE, 8 * BLOCK, BLOCK, payload=b"r" * BLOCK).error == 0
        assert client.read(8 * BLOCK, BLOCK) == b"r" * BLOCK
        assert client.ask(WRITE, 9 * BLOCK, BLOCK, payload=b"r" * BLOCK).error == ENOSPC
        running.call(device.close())


def test_zeroes_in_constant_memory(tmp_path):
    """F26: WRITE_ZEROES of 2^32-1 with all flags on an overlay: quick, and no memory for it."""
    base = MemoryDevice(1 << 20, read_only=True)
    OverlayDevice.create(tmp_path / "o", base=base, identity=b"base-1", size=8 << 30)
    device = reopen(tmp_path / "o", base)
    with ServerThread(tmp_path / "s", device) as running, RawClient(running.path) as client:
        client.greet().go(structured=True, contexts=(b"base:allocation",))
        assert client.ask(ZEROES, 0, 0xFFFFFFFF, FUA).error == 0
        assert client.ask(ZEROES, BLOCK, 0xFFFFF000, 16).error == 0
        assert client.ask(ZEROES, 1, 100, 16).error == 95
        assert client.read(0, 1 << 20) == bytes(1 << 20)
        assert client.ask(STATUS, 0, 0xFFFFFFFF).extents[1][0][1] == 3
        running.call(device.close())
    assert os.stat(tmp_path / "o" / "data").st_blocks * 512 < 1 << 20


async def test_parts_of_one_block_at_once(tmp_path):
    """Many concurrent writes of parts of one block that comes from a slow base all arrive."""
    base = MemoryDevice(SIZE, hits=False)
    device = make(tmp_path / "o", base)
    base.gate = asyncio.Event()
    model = bytearray(base.data)
    writes = []
    for index in range(64):
        payload = bytes([index]) * 128
        model[index * 128 : index * 128 + 128] = payload
        writes.append(device.write(index * 128, payload, fua=False))
    waiting = asyncio.gather(*writes)
    await asyncio.sleep(0)
    assert not device.try_write(0, b"z" * BLOCK)
    base.gate.set()
    await waiting
    assert await contents(device) == model
    await device.close()


async def test_torn_journal(tmp_path):
    """A journal cut at any byte of its last records loses those records only."""
    base = MemoryDevice(SIZE)
    device = make(tmp_path / "o", base)
    for block in range(4):
        await device.write(block * BLOCK, b"%d" % block * BLOCK, fua=False)
    await device.close()
    whole = (tmp_path / "o" / "journal").read_bytes()
    for cut in range(len(whole) - 3 * 32, len(whole)):
        for damage in (False, True):
            shutil.rmtree(tmp_path / "c", ignore_errors=True)
            shutil.copytree(tmp_path / "o", tmp_path / "c")
            torn = whole[:cut] + (b"\xff" * 7 if damage else b"")
            (tmp_path / "c" / "journal").write_bytes(torn)
            device = reopen(tmp_path / "c", base)
            kept = (cut - 512) // 32 - 1
            for block in range(4):
                expected = b"%d" % block * BLOCK if block < kept else pattern(block * BLOCK, BLOCK)
                assert await device.read_copied(block * BLOCK, BLOCK) == expected
            await device.write(9 * BLOCK, b"n" * BLOCK, fua=False)
            await device.close()
            device = reopen(tmp_path / "c", base)
            assert await device.read_copied(9 * BLOCK, BLOCK) == b"n" * BLOCK
            await device.close()


@pytest.mark.parametrize("seed", range(12))
async def test_power_loss(tmp_path, monkeypatch, seed):
    """After a power loss a block is as flushed or as written later, never anything else."""
    rng = random.Random(seed)
    base = MemoryDevice(SIZE)
    device = make(tmp_path / "o", base)
    allowed = {block: {bytes(base.data[block * BLOCK :][:BLOCK])} for block in range(64)}
    synced = None
    for _ in range(60):
        block = rng.randrange(64)
        choice = rng.random()
        if choice < 0.6:
            body = rng.randbytes(8) * 512
            await device.write(block * BLOCK, body, fua=False)
            allowed[block].add(body)
        elif choice < 0.75:
            await device.trim(block * BLOCK, BLOCK, fua=False)
            allowed[block].add(bytes(BLOCK))
        elif choice < 0.85 or synced is None:
            await device.flush()
            now = await contents(device)
            allowed = {index: {now[index * BLOCK :][:BLOCK]} for index in range(64)}
            synced = (tmp_path / "o" / "data").read_bytes()
    # The disk after the loss: of data, any mixture of flushed and later blocks; the journal whole.
    later = (tmp_path / "o" / "data").read_bytes()
    await device.close()
    mixed = b"".join(rng.choice((synced, later))[index * BLOCK :][:BLOCK] for index in range(64))
    (tmp_path / "o" / "data").write_bytes(mixed)
    monkeypatch.setattr(journal, "boot_identity", lambda: b"another boot id!")
    for _ in range(2):
        device = reopen(tmp_path / "o", base)
        found = await contents(device)
        await device.close()
        for index in range(64):
            assert found[index * BLOCK :][:BLOCK] in allowed[index] | {
                synced[index * BLOCK :][:BLOCK]
            }


async def test_compaction(tmp_path, monkeypatch):
    """A journal of many records is written anew, while writers go on, and loses nothing."""
    monkeypatch.setattr("nbdserver.overlay._COMPACT_RECORDS", 50)
    base = MemoryDevice(SIZE)
    device = make(tmp_path / "o", base)
    model = bytearray(base.data)

    async def writer(seed):
        rng = random.Random(seed)
        for _ in range(150):
            block = rng.randrange(16) * 4 + seed
            if rng.random() < 0.5:
                await device.trim(block * BLOCK, BLOCK, fua=False)
                model[block * BLOCK :][:BLOCK] = bytes(BLOCK)
                model[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
            else:
                body = rng.randbytes(BLOCK)
                await device.write(block * BLOCK, body, fua=rng.random() < 0.2)
                model[block * BLOCK : (block + 1) * BLOCK] = body

    await asyncio.gather(*[writer(seed) for seed in range(4)])
    await device.flush()
    assert (tmp_path / "o" / "journal").stat().st_size < 512 + 32 * 400
    assert await contents(device) == model
    await device.close()
    device = reopen(tmp_path / "o", base)
    assert await contents(device) == model
    await device.close()


async def test_disk_full(tmp_path, monkeypatch):
    """A journal that cannot grow: ENOSPC, nothing half done, and it works again afterwards."""
    base = MemoryDevice(SIZE)
    device = make(tmp_path / "o", base)

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(journal.Journal, "append", full)
    with pytest.raises(DeviceError) as failure:
        await device.write(0, b"x" * BLOCK, fua=False)
    assert failure.value.errno == errno.ENOSPC
    assert await contents(device) == base.data
    monkeypatch.undo()
    await device.write(0, b"x" * BLOCK, fua=False)
    assert await device.read_copied(0, BLOCK) == b"x" * BLOCK
    await device.close()


SERVER = """
import asyncio, sys
from pathlib import Path
from nbdserver.exports import StaticExports
from nbdserver.filedevice import FileDevice
from nbdserver.overlay import OverlayDevice
from nbdserver.server import Server
async def main():
    base = FileDevice(Path(sys.argv[1]))
    disk = OverlayDevice.open(Path(sys.argv[2]), base=base, identity=b"base-1")
    server = Server()
    server.listen_unix(Path(sys.argv[3]), StaticExports({"disk": disk}))
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("rounds", [6, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_at_random(tmp_path, rounds):
    """kill -9 at random moments under unsynced writes: no acknowledged write is lost."""
    rng = random.Random(rounds)
    image = tmp_path / "base.img"
    image.write_bytes(random.Random(1).randbytes(256 * BLOCK))
    OverlayDevice.create(tmp_path / "o", base=FileDevice(image), identity=b"base-1")
    model = bytearray(image.read_bytes())
    unsure: dict[int, bytes] = {}
    acknowledged = 0
    for _ in range(rounds):
        with ExitStack() as stack:
            command = [sys.executable, "-c", SERVER, image, tmp_path / "o", tmp_path / "s"]
            process = stack.enter_context(
                subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE)
            )
            stack.callback(process.kill)
            hung = threading.Timer(90, process.kill)
            stack.callback(hung.cancel)
            hung.start()
            assert process.stdout.readline() == b"ready\n"
            client = stack.enter_context(RawClient(tmp_path / "s"))
            client.greet().go()
            now = client.read(0, len(model))
            for offset, body in unsure.items():
                # Not acknowledged: old or new, as a whole block.
                if now[offset : offset + len(body)] == body:
                    model[offset : offset + len(body)] = body
            assert now == model
            unsure.clear()
            deadline = time.monotonic() + rng.random() * 0.15
            pending: dict[bytes, tuple[int, bytes]] = {}
            used: set[int] = set()
            try:
                while True:
                    while len(pending) < 16 and len(used) < 256:
                        block = rng.choice([index for index in range(256) if index not in used])
                        used.add(block)
                        body = rng.randbytes(BLOCK)
                        data = client.pack(WRITE, block * BLOCK, BLOCK, payload=body)
                        pending[client.last] = (block * BLOCK, body)
                        client.send(data)
                    if time.monotonic() > deadline:
                        os.kill(process.pid, signal.SIGKILL)
                    reply = client.reply()
                    assert reply.error == 0
                    offset, body = pending.pop(reply.cookie)
                    model[offset : offset + BLOCK] = body
                    used.discard(offset // BLOCK)
                    acknowledged += 1
            except Closed:
                unsure = dict(pending.values())
    assert acknowledged > rounds * 5


def test_flush_and_read_on_two_connections(tmp_path):
    """F28: a write acknowledged on A is read on B, before and after a flush."""
    base = MemoryDevice(SIZE)
    device = make(tmp_path / "o", base)
    with ServerThread(tmp_path / "s", device) as running:
        with RawClient(running.path) as one, RawClient(running.path) as two:
            one.greet().go()
            two.greet().go()
            for index in range(20):
                body = bytes([index]) * 1000
                assert one.ask(WRITE, index * 999, 1000, payload=body).error == 0
                assert two.read(index * 999, 1000) == body
            assert one.ask(FLUSH).error == 0
            assert two.read(0, 999) == bytes(999)
        running.call(device.close())
