"""The command, its transports, and the small pure parts: URIs, activation, fault scripts."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from kits.nbd_client import EIO, LIST, READ, REP_ACK, WRITE, RawClient
from kits.nbd_server import MemoryDevice, ServerThread, pattern

from nbdserver import cli
from nbdserver.activation import activated_sockets
from nbdserver.faults import Fault, FaultyDevice, parse_script
from nbdserver.uri import NbdUri, parse_uri


@pytest.mark.quick
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nbd://localhost", NbdUri(host="localhost")),
        ("nbd://localhost/", NbdUri(host="localhost")),
        ("nbd://[::1]:99/a%20b", NbdUri("a b", host="::1", port=99)),
        ("nbds://h/x/y", NbdUri("x/y", host="h", tls=True)),
        ("nbd+unix:///?socket=/run/x", NbdUri(unix=Path("/run/x"))),
        ("nbds+unix:///n?socket=/a%20b", NbdUri("n", unix=Path("/a b"), tls=True)),
    ],
)
def test_uris(text, expected):
    """What the NBD URI document shows."""
    assert parse_uri(text) == expected
    assert parse_uri(str(expected)) == expected


@pytest.mark.quick
@pytest.mark.parametrize(
    "text",
    [
        "http://x",
        "nbd://",
        "nbd://user@host/",
        "nbd://host/x#y",
        "nbd://host/?socket=/x",
        "nbd+unix:///x",
        "nbd+unix://host/x?socket=/y",
        "nbd+unix:///x?socket=/y&socket=/z",
        "nbd+unix:///x?socket=/y&tls=1",
        "nbd://host:99999/",
        "nbd://host/%ff",
    ],
)
def test_wrong_uris(text):
    """What is no NBD URI is a ValueError."""
    with pytest.raises(ValueError):
        parse_uri(text)


@pytest.mark.quick
@given(st.text(max_size=50).filter(lambda name: "\0" not in name and "\ud800" not in name))
def test_any_export_name_in_a_uri(name):
    """Every export name survives its URI."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    for uri in (NbdUri(name, host="h"), NbdUri(name, unix=Path("/a b?&=#"))):
        assert parse_uri(str(uri)) == uri


@pytest.mark.quick
def test_fault_scripts():
    """Words, repetitions and joined words; anything else is refused."""
    assert parse_script("ok*2 delay:0.5+error:EIO short corrupt") == [
        Fault(),
        Fault(),
        Fault(delay=0.5, error=errno.EIO),
        Fault(short=True),
        Fault(corrupt=True),
    ]
    for wrong in ("", "boom", "ok*0", "ok*x", "error:NOPE", "delay:-1", "delay:x", "ok*9999999"):
        with pytest.raises(ValueError):
            parse_script(wrong)


@pytest.mark.parametrize("framing", [{}, {"structured": True}, {"extended": True}])
def test_fault_device(tmp_path, framing):
    """Errors, short and late answers of a device: EIO or right bytes; `corrupt` flips a bit."""
    disk = MemoryDevice()
    script = "ok error:EIO error:ENOSPC short delay:0.05 corrupt ok*2 error:EROFS short ok"
    with ServerThread(tmp_path / "s", FaultyDevice(disk, script)) as running:
        with RawClient(running.path) as client:
            client.greet().go(**framing)
            assert client.read(0, 4096) == pattern(0, 4096)
            assert client.ask(READ, 0, 4096).error == EIO
            assert client.ask(READ, 0, 4096).error == 28
            assert client.ask(READ, 0, 4096).error == EIO
            assert client.read(0, 4096) == pattern(0, 4096)
            wrong = client.read(0, 4096)
            assert sum(a != b for a, b in zip(wrong, pattern(0, 4096), strict=True)) == 1
            assert client.read(0, 64) == pattern(0, 64)
            assert client.ask(WRITE, 0, 4, payload=b"abcd").error == 0
            assert client.ask(WRITE, 0, 4, payload=b"efgh").error == 1
            assert client.ask(WRITE, 8, 4, payload=b"ijkl").error == EIO
            assert client.read(0, 16)[:4] == b"abcd"


@pytest.mark.quick
def test_activation(monkeypatch):
    """LISTEN_FDS for this process only; the variables are removed; nonsense is refused."""
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    assert activated_sockets(environment, pid=2) == []
    for text in ("x", "-1", "99999999", ""):
        with pytest.raises(ValueError):
            activated_sockets({"LISTEN_PID": "2", "LISTEN_FDS": text}, pid=2)
    first, second = socket.socketpair()
    base = os.dup(first.fileno())
    monkeypatch.setattr("nbdserver.activation.FIRST_FD", base)
    environment = {"LISTEN_PID": "2", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "vm-1"}
    ((name, sock),) = activated_sockets(environment, pid=2)
    assert name == "vm-1" and not environment and not os.get_inheritable(sock.fileno())
    for each in (sock, first, second):
        each.close()


def launch(*arguments, **options):
    command = [sys.executable, "-m", "nbdserver.cli", *[str(word) for word in arguments]]
    return subprocess.Popen(command, **options)


def connect(path, process):
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        try:
            return RawClient(path)
        except OSError:
            time.sleep(0.01)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(0, 1 << 20))
    return path


def stop(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_serve_a_directory(tmp_path, image):
    """All files of a directory, by name; a stale socket file is replaced."""
    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        (tmp_path / "d" / name).write_bytes(pattern(0, 8192))
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "s"))
    stale.close()
    process = launch(tmp_path / "d", "-U", tmp_path / "s")
    with connect(tmp_path / "s", process) as client:
        client.greet()
        assert [body[4:] for _, body in client.option(LIST)][:-1] == [b"a", b"b"]
        client.go(b"b")
        assert client.read(8, 8) == pattern(8, 8)
    stop(process)
    assert not (tmp_path / "s").exists()


def test_overlay_and_quota(tmp_path, image):
    """--overlay keeps writes over a restart and leaves the file alone."""
    options = (image, "-U", tmp_path / "s", "-o", tmp_path / "o", "--quota", 8192)
    for expected in (pattern(0, 4096), b"w" * 4096):
        process = launch(*options)
        with connect(tmp_path / "s", process) as client:
            client.greet().go(b"")
            assert client.read(0, 4096) == expected
            assert client.ask(WRITE, 0, 4096, payload=b"w" * 4096).error == 0
            assert client.ask(WRITE, 4096, 8192, payload=b"w" * 8192).error == 28
        stop(process)
    assert image.read_bytes() == pattern(0, 1 << 20)


def test_stdin_and_stdout(image):
    """One client over a pair of pipes; the command ends with it."""
    to_server, from_us = os.pipe()
    to_us, from_server = os.pipe()
    process = launch(image, "--stdio", stdin=to_server, stdout=from_server)
    os.close(to_server)
    os.close(from_server)
    with open(from_us, "wb", buffering=0) as out, open(to_us, "rb") as into:
        assert into.read(18)[:8] == b"NBDMAGIC"
        out.write(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\0")
        assert into.read(10)[:8] == (1 << 20).to_bytes(8, "big")
        request = b"\x25\x60\x95\x13\0\0\0\0cookies!" + (4096).to_bytes(8, "big")
        out.write(request + (300_000).to_bytes(4, "big"))
        assert into.read(16) == b"\x67\x44\x66\x98\0\0\0\0cookies!"
        assert into.read(300_000) == pattern(4096, 300_000)
    assert process.wait(60) == 0


def test_socket_activation(tmp_path, image):
    """A listening socket passed as descriptor 3 is served, and survives as the manager's."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(5)
    script = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='disk');"
        "os.execv(sys.executable, [sys.executable, '-m', 'nbdserver.cli', sys.argv[2]])"
    )
    command = [sys.executable, "-c", script, str(listener.fileno()), str(image)]
    process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    with RawClient(tmp_path / "s") as client:
        client.greet().go(b"disk.img")
        assert client.read(0, 4096) == pattern(0, 4096)
    stop(process)
    assert (tmp_path / "s").exists()
    listener.close()


def test_tls_options(tmp_path, image):
    """--tls with certificates from files; without them it is an error."""
    authority = trustme.CA()
    identity = authority.issue_cert("localhost")
    identity.private_key_pem.write_to_path(tmp_path / "key.pem")
    identity.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with pytest.raises(ValueError, match="--cert"):
        cli.tls_policy("required", None, None, None)
    certificates = ("--cert", tmp_path / "cert.pem", "--key", tmp_path / "key.pem")
    process = launch(
        image,
        "-U",
        tmp_path / "s",
        "--tls",
        "required",
        *certificates,
        "--client-ca",
        tmp_path / "ca.pem",
        "--no-list",
        "-e",
        "n",
    )
    with connect(tmp_path / "s", process) as client:
        client.greet()
        assert client.verdict(5) == REP_ACK
    stop(process)


@pytest.mark.parametrize(
    "arguments", [["absent.img"], ["empty"], ["."], ["--tls", "required", "disk.img"]]
)
def test_errors_of_the_command(tmp_path, image, monkeypatch, capsys, arguments):
    """What cannot be served: exit code 1 and one line that says why."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    assert cli.main([*arguments, "-U", str(tmp_path / "s")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("nbdserver: ") and captured.err.count("\n") == 1


def test_two_servers_on_one_socket(tmp_path, image):
    """A socket on which somebody answers is not taken away."""
    process = launch(image, "-U", tmp_path / "s")
    connect(tmp_path / "s", process).close()
    assert launch(image, "-U", tmp_path / "s", stderr=subprocess.DEVNULL).wait(15) == 1
    connect(tmp_path / "s", process).close()
    stop(process)


def test_a_thousand_idle_clients(tmp_path, image):
    """1,000 idle clients cost little memory each, and a busy one is served beside them."""
    process = launch(image, "-U", tmp_path / "s")
    connect(tmp_path / "s", process).close()

    def resident():
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise AssertionError

    crowd = []
    for _ in range(50):
        crowd.append(RawClient(tmp_path / "s").greet())
        crowd[-1].go(b"")
    before = resident()
    for _ in range(1000):
        crowd.append(RawClient(tmp_path / "s").greet())
        crowd[-1].go(b"")
    each = (resident() - before) / 1000
    assert crowd[500].read(0, 65536) == pattern(0, 65536)
    for client in crowd:
        client.close()
    stop(process)
    print(f"memory per idle client: {each / 1024:.1f} KiB")
    assert each < 32 << 10
