"""TLS: off, optional, required, client certificates, and what goes wrong with them."""

import os
import socket
import ssl
import struct
import subprocess
import threading
import time

import pytest
import trustme
from kits.nbd_client import (
    ABORT,
    ERR_INVALID,
    ERR_TLS_REQD,
    EXPORT_NAME,
    GO,
    INFO,
    LIST,
    READ,
    REP_ACK,
    SET_META,
    STARTTLS,
    STATUS,
    STRUCTURED,
    WRITE,
    Closed,
    RawClient,
    go_body,
    meta_body,
)
from kits.nbd_server import MemoryDevice, ServerThread, pattern

from nbdserver.filedevice import FileDevice
from nbdserver.limits import Limits
from nbdserver.negotiation import TlsPolicy
from nbdserver.protocol.handshake import TlsMode


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def stranger():
    return trustme.CA()


def server_context(authority, *, clients=False):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    if clients:
        authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(authority, identity=None):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if identity is not None:
        identity.configure_cert(context)
    return context


def secure(client, context):
    """Upgrade a client after STARTTLS was acknowledged."""
    try:
        client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
    except (ssl.SSLError, OSError) as failure:
        client.sock.close()
        raise Closed from failure
    return client


@pytest.fixture
def start(tmp_path, authority, device):
    stack = []

    def run(mode="required", *, clients=False, limits=None, disk=device):
        policy = TlsPolicy(TlsMode(mode), server_context(authority, clients=clients))
        running = ServerThread(tmp_path / "s", disk, tls=policy, limits=limits)
        stack.append(running.__enter__())
        return running

    yield run
    for running in stack:
        running.__exit__(None, None, None)


@pytest.mark.parametrize("mode", ["optional", "required"])
@pytest.mark.parametrize("framing", [{}, {"structured": True}, {"extended": True}])
def test_everything_over_tls(start, authority, mode, framing):
    """All works over TLS: small and large reads, writes, many in flight."""
    running = start(mode)
    with RawClient(running.path) as client:
        client.greet()
        assert client.verdict(STARTTLS) == REP_ACK
        secure(client, client_context(authority))
        assert client.verdict(STARTTLS) == ERR_INVALID
        client.go(**framing)
        assert client.read(0, 4096) == pattern(0, 4096)
        assert client.read(0, 1 << 20) == pattern(0, 1 << 20)
        body = os.urandom(700_000)
        assert client.ask(WRITE, 1000, len(body), payload=body).error == 0
        client.send(b"".join(client.pack(READ, index * 1000, 3000) for index in range(200)))
        got = {}
        for _ in range(200):
            reply = client.reply()
            got[int.from_bytes(reply.cookie, "big")] = reply.data
        for index, key in enumerate(sorted(got)):
            offset = index * 1000
            expected = (pattern(0, 1000) + body)[offset : offset + 3000]
            assert got[key] == expected


def test_optional_without_tls(start):
    """Where TLS is optional, a plain client is served too."""
    running = start("optional")
    with RawClient(running.path) as client:
        client.greet().go()
        assert client.read(0, 8) == pattern(0, 8)


def test_commands_before_tls(start, authority):
    """E23: what was agreed before STARTTLS counts no more; injected bytes end the client."""
    running = start("optional")
    with RawClient(running.path) as client:
        client.greet()
        assert client.verdict(STRUCTURED) == REP_ACK
        assert client.verdict(SET_META, meta_body(b"disk", b"base:allocation")) == REP_ACK
        assert client.verdict(STARTTLS) == REP_ACK
        secure(client, client_context(authority))
        assert client.verdict(SET_META, meta_body(b"disk", b"base:allocation")) == ERR_INVALID
        client.go()
        assert client.ask(STATUS, 0, 4096).error == 22
        assert client.read(0, 8) == pattern(0, 8)
    with RawClient(running.path) as client:
        client.greet()
        head = struct.pack(">QII", 0x49484156454F5054, STARTTLS, 0)
        client.send(head + struct.pack(">QII", 0x49484156454F5054, LIST, 0))
        client.expect_closed()


def test_required(start):
    """E24: TLS required: ERR_TLS_REQD for all but STARTTLS and ABORT; EXPORT_NAME closes."""
    running = start("required")
    with RawClient(running.path) as client:
        client.greet()
        for option, body in (
            (LIST, b""),
            (INFO, go_body(b"disk")),
            (GO, go_body(b"disk")),
            (GO, b"\0\0"),
            (STRUCTURED, b""),
            (0x999, b"x"),
        ):
            assert client.verdict(option, body) == ERR_TLS_REQD
        assert client.verdict(ABORT) == REP_ACK
        client.expect_closed()
    with RawClient(running.path) as client:
        client.greet()
        client.send_option(EXPORT_NAME, b"disk")
        client.expect_closed()
    with RawClient(running.path) as client:
        client.greet(flags=0)
        client.expect_closed()


def test_stalls_and_wrong_certificates(start, authority, stranger):
    """E25: TLS stalls, wrong or absent certificates, a close in mid-read: closed in time."""
    running = start(clients=True, limits=Limits(handshake_seconds=0.5))

    def begin():
        client = RawClient(running.path).greet()
        assert client.verdict(STARTTLS) == REP_ACK
        return client

    with begin() as silent:
        silent.expect_closed()
    with begin() as half:
        half.send(bytes.fromhex("16030100c8010000c40303"))
        half.expect_closed()
    with begin() as nonsense:
        nonsense.send(b"this is not a TLS handshake")
        with pytest.raises(Closed):
            nonsense.recv(1 << 20)
    import datetime

    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    for identity in (
        None,
        stranger.issue_cert("client"),
        authority.issue_cert("client", not_after=past, not_before=past),
    ):
        client = begin()
        with pytest.raises(Closed):
            # With TLS 1.3 the client learns of the refusal when it next reads.
            secure(client, client_context(authority, identity))
            try:
                client.verdict(LIST)
            except (ssl.SSLError, OSError) as failure:
                raise Closed from failure
        client.close()
    with begin() as good:
        secure(good, client_context(authority, authority.issue_cert("client")))
        good.go()
        good.send(good.pack(READ, 0, 1 << 20) * 3)
        good.recv(1000)
        # Gone without a goodbye, in mid-reply.
    deadline = time.monotonic() + 60
    while running.server.counters.connections:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Nothing is left that could spin: the loop watches its own pipe and the listening socket.
    assert running.do(lambda: len(running.loop._selector.get_map())) == 2


def test_clean_goodbye(start, authority):
    """DISC over TLS: close_notify before the socket closes."""
    running = start()
    with RawClient(running.path) as client:
        client.greet()
        assert client.verdict(STARTTLS) == REP_ACK
        secure(client, client_context(authority))
        client.go()
        client.send(client.pack(2))
        assert client.sock.recv(100) == b""  # An unclean end would raise an SSLEOFError.


def test_truncated_file_over_tls(tmp_path, start, authority):
    """Encryption never touches the map: a cut file is EIO over TLS, not the server's death."""
    path = tmp_path / "cut.img"
    path.write_bytes(os.urandom(1 << 20))
    data = path.read_bytes()
    disk = FileDevice(path)
    running = start(disk=disk)
    with RawClient(running.path) as client:
        client.greet()
        assert client.verdict(STARTTLS) == REP_ACK
        secure(client, client_context(authority))
        client.go()
        os.truncate(path, 4096)
        assert client.ask(READ, 500_000, 4096).error == 5
        assert client.read(0, 4096) == data[:4096]
    running.call(disk.close())


def test_client_that_never_reads_over_tls(start, authority):
    """F19 over TLS: a client that reads nothing is bounded and closed."""
    disk = MemoryDevice(4 << 20)
    running = start(disk=disk, limits=Limits(stalled_seconds=0.5))
    with RawClient(running.path) as client:
        client.greet()
        assert client.verdict(STARTTLS) == REP_ACK
        secure(client, client_context(authority))
        client.go()
        client.send(b"".join(client.pack(READ, 0, 1 << 20) for _ in range(100)))
        deadline = time.monotonic() + 60
        while running.server.counters.stalls == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_over_tcp_with_real_clients(tmp_path, authority):
    """nbdinfo and nbdcopy over TLS with client certificates."""
    folder = tmp_path / "pki"
    folder.mkdir()
    authority.cert_pem.write_to_path(folder / "ca-cert.pem")
    identity = authority.issue_cert("client")
    identity.private_key_pem.write_to_path(folder / "client-key.pem")
    for blob in identity.cert_chain_pems:
        blob.write_to_path(folder / "client-cert.pem", append=True)
    policy = TlsPolicy(TlsMode.REQUIRED, server_context(authority, clients=True))
    disk = MemoryDevice(4 << 20)
    with ServerThread(tmp_path / "s", disk, tls=policy, listen=False) as running:
        listener = running.do(lambda: running.server.listen_tcp("127.0.0.1", 0, running.exports))
        port = listener.socket.getsockname()[1]
        uri = f"nbds://localhost:{port}/disk?tls-certificates={folder}"
        command = ["nbdcopy", uri, tmp_path / "out.img"]
        done = subprocess.run(command, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out.img").read_bytes() == bytes(disk.data)
        plain = subprocess.run(
            ["nbdinfo", "--size", f"nbd://localhost:{port}/disk"], capture_output=True, timeout=60
        )
        assert plain.returncode != 0


def test_policy_needs_a_context():
    """A policy that promises TLS without certificates is refused at once."""
    with pytest.raises(ValueError, match="context"):
        TlsPolicy(TlsMode.REQUIRED)


def test_many_tls_clients_at_once(start, authority):
    """Handshakes of several clients run side by side."""
    running = start()
    context = client_context(authority)
    results = []

    def one():
        with RawClient(running.path) as client:
            client.greet()
            client.verdict(STARTTLS)
            secure(client, context)
            client.go()
            results.append(client.read(0, 100_000) == pattern(0, 100_000))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [True] * 8


def test_pipes_have_no_tls(tmp_path, device):
    """Over pipes STARTTLS is refused, whatever the server's policy for sockets."""
    with ServerThread(tmp_path / "s", device, listen=False) as running:
        ours, theirs = socket.socketpair()
        fds = os.dup(theirs.fileno()), os.dup(theirs.fileno())
        theirs.close()
        running.do(lambda: running.server.serve_pipes(*fds, running.exports))
        with RawClient(ours) as client:
            client.greet()
            assert client.verdict(STARTTLS) & 0x80000000
            client.go()
            assert client.read(0, 5000) == pattern(0, 5000)
