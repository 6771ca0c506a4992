"""Clients that nobody here wrote: libnbd, nbdinfo, nbdcopy, qemu-img, qemu-io, fio."""

import json
import os
import random
import subprocess
from pathlib import Path

import nbd
import pytest
from kits.nbd_server import MemoryDevice, ServerThread

from nbdserver.filedevice import FileDevice
from nbdserver.overlay import OverlayDevice

SIZE = 32 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Random data, a hole, data again, and a hole at the end."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(random.Random(7).randbytes(5 << 20))
        file.seek(20 << 20)
        file.write(random.Random(8).randbytes(3 << 20))
        file.truncate(SIZE)
    return path


@pytest.fixture
def readable(tmp_path, image):
    with ServerThread(tmp_path / "r.sock", FileDevice(image)) as running:
        yield running
        running.call(running.exports.close())


@pytest.fixture(params=["file", "overlay"])
def writable(tmp_path, request):
    """A file of zeros, or an overlay over one; `content()` is what it holds."""
    path = tmp_path / "target.img"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    disk = FileDevice(path, read_only=request.param == "overlay")
    if request.param == "overlay":
        OverlayDevice.create(tmp_path / "overlay", base=disk, identity=b"base")
        disk = OverlayDevice.open(tmp_path / "overlay", base=disk, identity=b"base")
    with ServerThread(tmp_path / "w.sock", {"": disk, "disk": disk}) as running:
        running.content = lambda: running.call(disk.read_copied(0, SIZE))
        yield running
        running.call(disk.close())


def run(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


# --- libnbd: what its interop, opt and errors tests check ---


def test_libnbd_everything(writable):
    """Connect, flags, every command, block status with two extents callbacks."""
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(writable.uri)
    assert handle.get_size() == SIZE
    assert handle.get_structured_replies_negotiated()
    for can in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "df", "multi_conn"):
        assert getattr(handle, f"can_{can}")(), can
    assert not handle.is_read_only()
    assert handle.can_meta_context("base:allocation")
    handle.pwrite(b"hello" * 1000, 1 << 20, nbd.CMD_FLAG_FUA)
    assert handle.pread(5000, 1 << 20) == b"hello" * 1000
    handle.flush()
    handle.zero(4096, 1 << 20)
    assert handle.pread(4096, 1 << 20) == bytes(4096)
    handle.zero(4096, 2 << 20, nbd.CMD_FLAG_NO_HOLE)
    handle.trim(4096, 1 << 20)
    handle.cache(1 << 20, 0)
    entries = []
    handle.block_status(SIZE, 0, lambda context, offset, found, error: entries.append(found) or 0)
    assert sum(entries[0][::2]) == SIZE
    handle.shutdown()


def test_libnbd_opt_mode(readable):
    """LIST, INFO and contexts in option mode, then GO, as libnbd's opt tests do."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(readable.uri)
    names = []
    assert handle.opt_list(lambda name, text: names.append(name) or 0) == 1
    assert names == ["disk"]
    handle.set_export_name("absent")
    with pytest.raises(nbd.Error):
        handle.opt_info()
    with pytest.raises(nbd.Error):
        handle.opt_go()
    handle.set_export_name("disk")
    handle.set_full_info(True)
    handle.opt_info()
    assert handle.get_size() == SIZE and handle.is_read_only()
    assert handle.get_canonical_export_name() == "disk"
    assert handle.get_export_description() == "disk.img"
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
    found = []
    handle.add_meta_context("base:")
    handle.opt_list_meta_context(lambda name: found.append(name) or 0)
    assert found == ["base:allocation"]
    handle.opt_go()
    handle.shutdown()
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(readable.uri)
    handle.opt_abort()


def test_libnbd_errors(readable):
    """What a client library refuses by itself is let through: the server's errors."""
    handle = nbd.NBD()
    handle.set_strict_mode(0)
    handle.connect_uri(readable.uri)
    for call, expected in (
        (lambda: handle.pread(512, SIZE), "EINVAL"),
        (lambda: handle.pread(512, SIZE - 1), "EINVAL"),
        (lambda: handle.pwrite(b"x" * 512, 0), "EPERM"),
        (lambda: handle.trim(512, 0), "EPERM"),
        (lambda: handle.zero(512, 0), "EPERM"),
        (lambda: handle.block_status(512, 0, lambda *found: 0), "EINVAL"),
    ):
        with pytest.raises(nbd.Error) as failure:
            call()
        assert failure.value.errno == expected
    assert len(handle.pread(512, 0)) == 512
    handle.shutdown()


def test_libnbd_older_clients(readable):
    """A client without structured replies, and one that knows EXPORT_NAME only."""
    for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_NO_ZEROES):
        handle = nbd.NBD()
        handle.set_request_structured_replies(False)
        handle.set_handshake_flags(flags)
        handle.connect_uri(readable.uri)
        assert len(handle.pread(4096, 0)) == 4096
        handle.shutdown()


def test_libnbd_many_in_flight(readable, image):
    """Asynchronous reads in flight, answered in any order."""
    handle = nbd.NBD()
    handle.connect_uri(readable.uri)
    data = image.read_bytes()
    pending = []
    for index in range(200):
        offset = index * 7919 * 13 % (SIZE - 70_000)
        buffer = nbd.Buffer(1000 + index * 300)
        pending.append((handle.aio_pread(buffer, offset), buffer, offset))
    while handle.aio_in_flight():
        handle.poll(10_000)
    for cookie, buffer, offset in pending:
        assert handle.aio_command_completed(cookie)
        assert buffer.to_bytearray() == data[offset : offset + buffer.size()]
    handle.shutdown()


def test_libnbd_multi_conn(writable):
    """A flush on one connection covers writes on the other."""
    one, two = nbd.NBD(), nbd.NBD()
    one.connect_uri(writable.uri)
    two.connect_uri(writable.uri)
    one.pwrite(b"a" * 512, 0)
    two.flush()
    assert two.pread(512, 0) == b"a" * 512
    one.shutdown()
    two.shutdown()


# --- programs ---


def test_nbdinfo(readable, image):
    """nbdinfo: facts, list, and a map that agrees with the file's holes."""
    facts = json.loads(run("nbdinfo", "--json", readable.uri))["exports"][0]
    assert facts["export-size"] == SIZE and facts["is_read_only"] and facts["can_multi_conn"]
    assert (
        json.loads(run("nbdinfo", "--list", "--json", readable.uri))["exports"][0]["export-name"]
        == "disk"
    )
    extents = json.loads(run("nbdinfo", "--map", "--json", readable.uri))
    assert [(entry["offset"], entry["length"], entry["type"]) for entry in extents] == [
        (0, 5 << 20, 0),
        (5 << 20, 15 << 20, 3),
        (20 << 20, 3 << 20, 0),
        (23 << 20, 9 << 20, 3),
    ]


@pytest.mark.parametrize("options", [(), ("--no-extents",), ("--connections=4", "--requests=16")])
def test_nbdcopy(readable, writable, image, tmp_path, options):
    """nbdcopy in both directions and from export to export, with and without extents."""
    target = tmp_path / "copy.img"
    run("nbdcopy", *options, readable.uri, target)
    assert target.read_bytes() == image.read_bytes()
    run("nbdcopy", *options, image, writable.uri)
    assert writable.content() == image.read_bytes()
    run("nbdcopy", *options, "--flush", "--target-is-zero", readable.uri, writable.uri)
    assert writable.content() == image.read_bytes()


def test_qemu_img(readable, writable, image, tmp_path):
    """qemu-img: convert in both directions, compare, map."""
    run("qemu-img", "convert", "-O", "qcow2", readable.uri, tmp_path / "c.qcow2")
    run("qemu-img", "compare", tmp_path / "c.qcow2", readable.uri)
    run("qemu-img", "convert", "-n", "-O", "raw", tmp_path / "c.qcow2", writable.uri)
    run("qemu-img", "compare", readable.uri, writable.uri)
    assert writable.content() == image.read_bytes()
    extents = json.loads(run("qemu-img", "map", "--output=json", readable.uri))
    assert [(entry["start"], entry["length"], entry["zero"]) for entry in extents] == [
        (0, 5 << 20, False),
        (5 << 20, 15 << 20, True),
        (20 << 20, 3 << 20, False),
        (23 << 20, 9 << 20, True),
    ]


def test_qemu_io(writable):
    """qemu-io: read, write, zero, discard and FUA patterns are verified by qemu-io itself."""
    commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 512k 64k",
        "read -P 0x11 0 512k",
        "read -P 0x22 512k 64k",
        "write -z 100k 200k",
        "read -P 0 100k 200k",
        "write -z -u 600k 100k",
        "read -P 0 600k 100k",
        "discard 0 64k",
        "read -P 0 0 64k",
        "aio_write -P 0x33 2M 1M",
        "aio_write -P 0x44 3M 1M",
        "aio_flush",
        "flush",
        "read -P 0x33 2M 1M",
        "read -P 0x44 3M 1M",
        "write -P 0x55 31M 1M",
        "read -P 0x55 31M 1M",
    ]
    words = [word for command in commands for word in ("-c", command)]
    output = run("qemu-io", "-f", "raw", "-t", "writeback", *words, writable.uri)
    assert "Pattern verification failed" not in output
    assert "error" not in output.lower()


@pytest.mark.parametrize("pattern", ["randwrite", "randrw"])
def test_fio_verify(writable, pattern):
    """fio writes random blocks of mixed sizes, and verifies each by its checksum."""
    run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={writable.uri}",
        f"--rw={pattern}",
        "--bsrange=512-256k",
        "--bs_unaligned=0",
        "--iodepth=16",
        "--size=16M",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--output-format=terse",
    )


def test_truncated_file(tmp_path):
    """A mapped file that was cut: EIO for what is gone, right bytes for the rest."""
    path = tmp_path / "cut.img"
    path.write_bytes(random.Random(9).randbytes(8 << 20))
    whole = path.read_bytes()
    with ServerThread(tmp_path / "s", FileDevice(path)) as running:
        handle = nbd.NBD()
        handle.connect_uri(running.uri)
        os.truncate(path, 4 << 20)
        buffers = []
        for offset in (0, 3 << 20, 4 << 20, 7 << 20, 1 << 20):
            buffer = nbd.Buffer(65536)
            buffers.append((handle.aio_pread(buffer, offset), buffer, offset))
        while handle.aio_in_flight():
            handle.poll(10_000)
        for cookie, buffer, offset in buffers:
            if offset < 4 << 20:
                assert handle.aio_command_completed(cookie)
                assert buffer.to_bytearray() == whole[offset : offset + 65536]
            else:
                with pytest.raises(nbd.Error) as failure:
                    handle.aio_command_completed(cookie)
                assert failure.value.errno == "EIO"
        assert handle.pread(4096, 0) == whole[:4096]
        assert running.server.counters.faults >= 1
        handle.shutdown()
        running.call(running.exports.close())


def test_file_that_grows_shorter_in_mid_reply(tmp_path):
    """Where a reply has begun and its bytes cannot follow, the connection closes."""
    path = tmp_path / "cut.img"
    path.write_bytes(b"\xaa" * (24 << 20))
    with ServerThread(tmp_path / "s", FileDevice(path)) as running:
        from kits.nbd_client import READ, Closed, RawClient

        with RawClient(running.path) as client:
            client.greet().go()
            client.send(client.pack(READ, 0, 24 << 20))
            assert client.recv(16)[4:8] == bytes(4)
            os.truncate(path, 1 << 20)
            with pytest.raises(Closed):
                client.recv(24 << 20)
        running.call(running.exports.close())


def test_listing_of_pins(tmp_path):
    """After all the programs above, no pin is left: the same with a device that counts them."""
    disk = MemoryDevice(8 << 20)
    with ServerThread(tmp_path / "s", disk) as running:
        run("nbdcopy", "--requests=64", running.uri, tmp_path / "out.img")
        assert (tmp_path / "out.img").read_bytes() == bytes(disk.data)
        assert running.do(lambda: disk.pinned) == 0
