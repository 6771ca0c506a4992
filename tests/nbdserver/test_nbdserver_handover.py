"""Hand-over of sockets and live connections to a new process, and death of the old one."""

import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
from kits.nbd_client import EIO, READ, WRITE, Closed, RawClient
from kits.nbd_server import MemoryDevice, ServerThread, pattern

from nbdserver.exports import StaticExports
from nbdserver.handover import ConnectionState, HandoverError, hand_over, take_over
from nbdserver.limits import Limits
from nbdserver.protocol.constants import ReplyMode
from nbdserver.protocol.session import Session

BLOCK = 4096
FRAMINGS = [{}, {"structured": True}, {"extended": True}]


def pass_all(old, new, exports_for=None, **hooks):
    """Hand over from one ServerThread to another; (passed, adopted)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        giving = asyncio.run_coroutine_threadsafe(hand_over(old.server, ours, **hooks), old.loop)
        taking = take_over(new.server, theirs, exports_for or (lambda label: new.exports))
        try:
            adopted = new.call(taking)
        except HandoverError:
            adopted = None
        try:
            return giving.result(20), adopted
        except HandoverError:
            return None, adopted


@pytest.fixture
def pair(tmp_path, device):
    with ServerThread(tmp_path / "nbd.sock", device) as old:
        with ServerThread(tmp_path / "unused", old.exports, listen=False) as new:
            yield old, new


@pytest.mark.parametrize("framing", FRAMINGS)
def test_connection_moves(pair, framing):
    """A connection goes on in the new server, half-received requests and the listener too."""
    old, new = pair
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(old.path)) for _ in range(4)]
        for client in clients:
            client.greet().go(**framing)
            assert client.read(0, BLOCK) == pattern(0, BLOCK)
        far = (1 << 20) - BLOCK  # away from the write that is half there
        request = clients[1].pack(READ, far, BLOCK)
        clients[1].send(request[:13])
        payload = os.urandom(600_000)
        write = clients[2].pack(WRITE, 0, len(payload), payload=payload)
        clients[2].send(write[:300_000])
        refused = clients[3].pack(WRITE, 1 << 20, 500_000, payload=bytes(500_000))
        clients[3].send(refused[:1000])
        assert clients[3].reply().error
        time.sleep(0.05)
        assert pass_all(old, new) == (4, 4)
        assert clients[0].read(far, BLOCK) == pattern(far, BLOCK)
        clients[1].send(request[13:])
        assert clients[1].reply().data == pattern(far, BLOCK)
        clients[2].send(write[300_000:])
        assert clients[2].reply().error == 0
        assert clients[0].read(0, len(payload)) == payload
        clients[3].send(refused[1000:])
        assert clients[3].read(0, 100) == payload[:100]
        fresh = stack.enter_context(RawClient(old.path))
        fresh.greet().go(**framing)
        assert fresh.read(0, 10) == payload[:10]
        assert not old.server.clients and len(new.server.clients) == 5


def test_requests_in_flight_are_answered_first(pair, device):
    """Writes that the old server had begun, it answers; what came meanwhile, the new one does."""
    old, new = pair
    with RawClient(old.path) as client:
        client.greet().go()
        old.do(lambda: setattr(device, "gate", asyncio.Event()))
        client.send(client.pack(WRITE, 0, BLOCK, payload=pattern(BLOCK, BLOCK)))
        wait_until(lambda: old.do(lambda: old.server._turn.waiting))
        opener = threading.Timer(0.2, lambda: old.do(lambda: device.gate.set()))
        opener.start()
        late = threading.Timer(0.1, lambda: client.send(client.pack(READ, BLOCK, BLOCK)))
        late.start()
        assert pass_all(old, new) == (1, 1)
        opener.join(60)
        late.join(60)
        device.gate = None
        assert client.reply().error == 0
        assert client.reply().data == pattern(BLOCK, BLOCK)
        assert client.read(0, BLOCK) == pattern(BLOCK, BLOCK)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_reads_that_wait_are_asked_again_by_the_successor(pair, device, framing):
    """A read whose bytes do not come holds nothing up, and is answered once, whoever goes on."""
    old, new = pair

    def unknown(label):
        raise LookupError(label)

    with RawClient(old.path) as client:
        client.greet().go(**framing)
        old.do(lambda: setattr(device, "gate", asyncio.Event()))
        client.send(b"".join(client.pack(READ, n * BLOCK, BLOCK) for n in range(3)))
        late = client.pack(READ, 3 * BLOCK, BLOCK)
        client.send(late[:10])
        wait_until(lambda: old.do(lambda: old.server._turn.waiting) == 3)
        assert pass_all(old, new, unknown) == (None, None)
        assert old.do(lambda: old.server._turn.waiting) == 3
        gate = device.gate = asyncio.Event()  # one of the new server's loop
        assert pass_all(old, new) == (1, 1)
        assert not old.do(lambda: old.server._turn.waiting)
        client.send(late[10:])
        device.gate = None
        new.do(gate.set)
        found = {client.reply().data for _ in range(4)}
        assert found == {pattern(n * BLOCK, BLOCK) for n in range(4)}


def test_successor_that_refuses(pair):
    """The new process knows no such export, or dies: the old one serves on, hooks are called."""
    old, new = pair
    called = []

    async def held():
        called.append("held")

    async def failed():
        called.append("failed")

    def unknown(label):
        raise LookupError(label)

    with RawClient(old.path) as client:
        client.greet().go()
        hooks = {"on_held": held, "on_failure": failed}
        assert pass_all(old, new, unknown, **hooks) == (None, None)
        assert called == ["held", "failed"]
        assert client.read(0, BLOCK) == pattern(0, BLOCK)
        ours, theirs = socket.socketpair()
        theirs.close()
        with ours, pytest.raises(HandoverError):
            old.call(hand_over(old.server, ours))
        assert client.read(0, BLOCK) == pattern(0, BLOCK)
        with RawClient(old.path) as fresh:
            fresh.greet().go()
        assert pass_all(old, new) == (1, 1)
        assert client.read(BLOCK, BLOCK) == pattern(BLOCK, BLOCK)


def test_export_that_is_no_longer_the_same(pair):
    """A client whose export has another size now is closed rather than misled."""
    old, new = pair
    other = StaticExports({"disk": MemoryDevice(2 << 20)})
    with RawClient(old.path) as client:
        client.greet().go()
        assert pass_all(old, new, lambda label: other) == (1, 0)
        client.expect_closed()


def test_client_that_reads_no_answers_stays_behind(tmp_path):
    """A stuck client does not hold up the others."""
    disk = MemoryDevice(8 << 20)
    with ServerThread(tmp_path / "s", disk, limits=Limits(drain_seconds=0.2)) as old:
        with ServerThread(tmp_path / "t", old.exports, listen=False) as new:
            with RawClient(old.path) as stuck, RawClient(old.path) as client:
                stuck.greet().go()
                client.greet().go()
                stuck.send(b"".join(stuck.pack(READ, 0, 8 << 20) for _ in range(4)))
                assert pass_all(old, new, seconds=0.6) == (1, 1)
                assert client.read(0, BLOCK) == pattern(0, BLOCK)


def test_malformed_frames(pair):
    """Nonsense from the other process is an error, and nothing is taken."""
    _old, new = pair
    for junk in (
        b"\xff\xff\xff\xff",
        b"\0\0\0\x02[]",
        b"\0\0\0\x02{}",
        b"\0\0\0\x03abc",
        b'\0\0\0\x1f{"kind": "hello", "version": 9}',
        b'\0\0\0\x1f{"kind": "hello", "version": 1}\0\0\0\x14{"kind": "listener"}',
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(junk)
            ours.shutdown(socket.SHUT_WR)
            with pytest.raises(HandoverError):
                new.call(take_over(new.server, theirs, lambda label: new.exports))
    assert not new.server.listeners


def test_state_record():
    """The written-down state of a connection survives its own encoding."""
    session = Session("disk", 1 << 40, 0x5F5, ReplyMode.EXTENDED, 512, 1 << 25, ((1, "base:x"),))
    state = ConnectionState("/run/x.sock", "", session, 12, b"tail")
    assert ConnectionState.decode(state.encode(), b"tail") == state
    for broken in ({}, {**state.encode(), "mode": 7}, {**state.encode(), "contexts": [1]}):
        with pytest.raises(HandoverError):
            ConnectionState.decode(broken, b"")


# --- between processes, with the command ---


def start(tmp_path, number, *options, image="base.img"):
    command = [sys.executable, "-m", "nbdserver.cli", tmp_path / image, "-o", tmp_path / "overlays"]
    command += ["--control", tmp_path / f"control-{number}", *options]
    return subprocess.Popen([str(word) for word in command])


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for(path):
    wait_until(path.exists)


class Workload(threading.Thread):
    """Verified reads and writes of whole blocks, without any flush, until told to stop."""

    def __init__(self, path, model, seed):
        super().__init__()
        self.path, self.model, self.seed = path, model, seed
        self.stop = threading.Event()
        self.failures, self.done, self.worst = [], 0, 0.0
        self.reconnect = False

    def run(self):
        try:
            self._work()
        except Exception as failure:
            self.failures.append(failure)

    def _connect(self):
        deadline = time.monotonic() + 15
        while True:
            try:
                client = RawClient(self.path)
                try:
                    client.greet().go(b"base.img")
                    return client
                except BaseException:
                    client.close()
                    raise
            except (OSError, Closed):
                assert time.monotonic() < deadline
                time.sleep(0.002)

    def _work(self):
        rng = random.Random(self.seed)
        client = self._connect()
        mine = range(self.seed, len(self.model) // BLOCK, 4)
        while not self.stop.is_set():
            block = rng.choice(mine)
            offset = block * BLOCK
            body = rng.randbytes(BLOCK) if rng.random() < 0.4 else None
            began = time.monotonic()
            while True:
                try:
                    if body:
                        assert client.ask(WRITE, offset, BLOCK, payload=body).error == 0
                    else:
                        assert client.read(offset, BLOCK) == self.model[offset : offset + BLOCK]
                    break
                except Closed:
                    if not self.reconnect:
                        raise
                    client.close()
                    client = self._connect()
            if body:
                self.model[offset : offset + BLOCK] = body
            self.done += 1
            self.worst = max(self.worst, time.monotonic() - began)
        client.close()


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_hand_over_under_load(tmp_path, rounds):
    """Hand-overs under verified reads and writes: no error, no lost write; the pause is told."""
    image = tmp_path / "base.img"
    image.write_bytes(random.Random(3).randbytes(512 * BLOCK))
    model = bytearray(image.read_bytes())
    sock = tmp_path / "nbd.sock"
    with ExitStack() as stack:
        process = start(tmp_path, 0, "-U", sock)
        stack.callback(lambda: (process.kill(), process.wait()))
        wait_for(tmp_path / "control-0")
        loads = [Workload(sock, model, seed) for seed in range(4)]
        for load in loads:
            load.start()
        pauses = []
        for number in range(1, rounds + 1):
            time.sleep(random.random() * 0.2)
            for load in loads:
                load.worst = 0.0
            before = process
            process = start(tmp_path, number, "--take-over", tmp_path / f"control-{number - 1}")
            wait_for(tmp_path / f"control-{number}")
            assert before.wait(60) == 0
            time.sleep(0.05)
            pauses.append(max(load.worst for load in loads))
        for load in loads:
            load.stop.set()
        for load in loads:
            load.join(90)
        assert [load.failures for load in loads] == [[], [], [], []]
        assert all(load.done > rounds for load in loads)
        with RawClient(sock) as client:
            client.greet().go(b"base.img")
            assert client.read(0, len(model)) == model
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        print(told(f"{rounds} hand-overs", loads, pauses))


def told(what, loads, pauses):
    return (
        f"{what}, {sum(load.done for load in loads)} requests, pause ms: "
        f"median {statistics.median(pauses) * 1e3:.1f} worst {max(pauses) * 1e3:.1f}"
    )


@pytest.mark.parametrize("rounds", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_killed_and_restarted_under_load(tmp_path, rounds):
    """kill -9 and restart, with clients that reconnect: no error, no acknowledged write lost."""
    image = tmp_path / "base.img"
    image.write_bytes(random.Random(4).randbytes(512 * BLOCK))
    model = bytearray(image.read_bytes())
    sock = tmp_path / "nbd.sock"
    with ExitStack() as stack:
        process = start(tmp_path, 0, "-U", sock)
        stack.callback(lambda: (process.kill(), process.wait()))
        wait_for(tmp_path / "control-0")
        loads = [Workload(sock, model, seed) for seed in range(4)]
        for load in loads:
            load.reconnect = True
            load.start()
        pauses = []
        for number in range(1, rounds + 1):
            time.sleep(0.05 + random.random() * 0.2)
            for load in loads:
                load.worst = 0.0
            process.kill()
            process.wait()
            process = start(tmp_path, number, "-U", sock)
            wait_for(tmp_path / f"control-{number}")
            done = [load.done for load in loads]
            wait_until(lambda: all(load.done > at + 1 for load, at in zip(loads, done)))
            pauses.append(max(load.worst for load in loads))
        for load in loads:
            load.stop.set()
        for load in loads:
            load.join(90)
        assert [load.failures for load in loads] == [[], [], [], []]
        with RawClient(sock) as client:
            client.greet().go(b"base.img")
            assert client.read(0, len(model)) == model
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        print(told(f"{rounds} kills", loads, pauses))


def test_qemu_reconnects(tmp_path):
    """QEMU with reconnect-delay sees a kill -9 and restart of the server as a pause."""
    image = tmp_path / "base.img"
    image.write_bytes(random.Random(5).randbytes(512 * BLOCK))
    sock = tmp_path / "nbd.sock"
    with ExitStack() as stack:
        process = start(tmp_path, 0, "-U", sock)
        stack.callback(lambda: (process.kill(), process.wait()))
        wait_for(tmp_path / "control-0")
        options = f"driver=nbd,server.type=unix,server.path={sock},reconnect-delay=15"
        qemu = stack.enter_context(
            subprocess.Popen(
                ["qemu-io", "-t", "writeback", "--image-opts", options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        stack.callback(qemu.kill)
        hung = threading.Timer(120, qemu.kill)
        stack.callback(hung.cancel)
        hung.start()
        qemu.stdin.write("write -P 0x5a 0 64k\n")
        qemu.stdin.flush()
        line = ""
        while "wrote" not in line:
            line = qemu.stdout.readline()
            assert line and "rror" not in line
        process.kill()
        process.wait()
        qemu.stdin.write("read -P 0x5a 0 64k\nwrite -P 0x66 64k 64k\nread -P 0x66 64k 64k\nquit\n")
        qemu.stdin.flush()
        time.sleep(0.3)
        process = start(tmp_path, 1, "-U", sock)
        output, _ = qemu.communicate(timeout=120)
        assert qemu.returncode == 0 and "rror" not in output and "failed" not in output, output
        assert output.count("read 65536/65536") == 2


def test_error_after_hold_is_answered(pair, device):
    """A failing request in flight is answered with its error before the connection moves."""
    old, new = pair
    with RawClient(old.path) as client:
        client.greet().go()
        device.error = 5
        client.send(client.pack(READ, 0, BLOCK))
        moved = pass_all(old, new)
        assert moved == (1, 1)
        assert client.reply().error == EIO
        device.error = 0
        assert client.read(0, BLOCK) == pattern(0, BLOCK)
