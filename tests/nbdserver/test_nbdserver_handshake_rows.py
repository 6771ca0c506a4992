"""Rows E1-E34 of the bad-input catalogue that need no TLS, on the wire."""

import gc
import os
import socket
import struct
import time

import pytest
from kits.nbd_client import (
    ABORT,
    EINVAL,
    ERR_EXT_HEADER,
    ERR_INVALID,
    ERR_POLICY,
    ERR_TOO_BIG,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED,
    GO,
    IHAVEOPT,
    INFO,
    LIST,
    LIST_META,
    READ,
    REP_ACK,
    REP_SERVER,
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

from nbdserver.exports import StaticExports
from nbdserver.limits import Limits


def still_works(client):
    """The next valid option works."""
    kinds = [kind for kind, _ in client.option(LIST)]
    assert kinds == [REP_SERVER, REP_ACK]


def test_unknown_client_flags(connect):
    """E1: unknown client flag bits: close."""
    connect(flags=0x83).expect_closed()


def test_wrong_option_magic(connect):
    """E2: a wrong option magic: close."""
    client = connect()
    client.send(b"\0" * 16)
    client.expect_closed()


def test_unknown_option_with_payload(connect):
    """E3: an unknown option with a payload: ERR_UNSUP, then LIST works."""
    client = connect()
    assert client.verdict(0x7777, b"x" * 1000) == ERR_UNSUP
    still_works(client)


def test_huge_option(connect):
    """E4: an option of 4 GiB: closed after at most 64 KiB."""
    client = connect()
    client.send(struct.pack(">QII", IHAVEOPT, GO, 0xFFFFFFFF))
    sent = 0
    with pytest.raises((Closed, OSError)):
        while True:
            client.send(bytes(4096))
            sent += 4096
            assert sent < 4 << 20
            time.sleep(0.001)
    assert sent <= 512 << 10  # the socket's own buffer takes some before the close is seen


@pytest.mark.parametrize(
    "body",
    [
        struct.pack(">I", 0xFFFFFFFF) + b"disk" + b"\0\0",
        struct.pack(">I", 20) + b"disk" + b"\0\0",
        b"\0\0",
        struct.pack(">I", 4) + b"disk" + struct.pack(">H", 3) + b"\0\0",
        struct.pack(">I", 4) + b"disk" + struct.pack(">H", 0) + b"\0\0",
    ],
    ids=["length 2^32-1", "longer than payload", "2 bytes", "infos missing", "trailing"],
)
@pytest.mark.parametrize("option", [GO, INFO])
def test_malformed_go(connect, option, body):
    """E5-E7: GO with a wrong name length or a short payload: ERR_INVALID, in step."""
    client = connect()
    assert client.verdict(option, body) == ERR_INVALID
    still_works(client)
    assert client.verdict(GO, go_body(b"disk")) == REP_ACK


def test_long_names(connect):
    """E8, E9: a name of 4096 bytes: ERR_UNKNOWN; of 5000: ERR_INVALID."""
    client = connect()
    assert client.verdict(GO, go_body(b"a" * 4096)) == ERR_UNKNOWN
    assert client.verdict(GO, go_body(b"a" * 5000)) == ERR_INVALID
    still_works(client)


def test_export_name_too_long(connect):
    """E10: EXPORT_NAME too long: close; so for an unknown name."""
    for name in (b"a" * 5000, b"unknown"):
        client = connect()
        client.send_option(EXPORT_NAME, name)
        client.expect_closed()


def test_payload_where_none_belongs(connect):
    """E11, E12: LIST or STRUCTURED_REPLY (or EXTENDED_HEADERS) with a payload: ERR_INVALID."""
    client = connect()
    for option in (LIST, STRUCTURED, EXTENDED):
        assert client.verdict(option, b"x") == ERR_INVALID
        still_works(client)


def test_starttls_where_off(connect):
    """E13: STARTTLS where TLS is off: ERR_POLICY; with a payload ERR_INVALID."""
    client = connect()
    assert client.verdict(STARTTLS) == ERR_POLICY
    assert client.verdict(STARTTLS, b"x") == ERR_INVALID
    still_works(client)


def test_contexts_before_structured_replies(connect):
    """E14: SET_META_CONTEXT before STRUCTURED_REPLY: ERR_INVALID."""
    client = connect()
    assert client.verdict(SET_META, meta_body(b"disk", b"base:allocation")) == ERR_INVALID
    assert client.verdict(LIST_META, meta_body(b"disk")) == ERR_INVALID
    still_works(client)


def test_malformed_context_queries(connect):
    """E15, E16: trailing bytes or 2^32-1 queries: ERR_INVALID, and in step; many: ERR_TOO_BIG."""
    client = connect()
    assert client.verdict(STRUCTURED) == REP_ACK
    assert client.verdict(SET_META, meta_body(b"disk", b"base:allocation") + b"x") == ERR_INVALID
    lying = struct.pack(">I", 4) + b"disk" + struct.pack(">I", 0xFFFFFFFF)
    assert client.verdict(SET_META, lying) == ERR_INVALID
    assert client.verdict(SET_META, lying + b"\0\0\0\x0fbase:allocation") == ERR_INVALID
    assert client.verdict(SET_META, meta_body(b"disk", *[b"x-a:b"] * 200)) == ERR_TOO_BIG
    assert client.verdict(SET_META, meta_body(b"nobody", b"base:allocation")) == ERR_UNKNOWN
    still_works(client)
    # A failed SET drops what was set before.
    assert client.verdict(SET_META, meta_body(b"disk", b"base:allocation")) == REP_ACK
    assert client.verdict(SET_META, b"") == ERR_INVALID
    client.structured = True
    client.go()
    assert client.ask(STATUS, 0, 4096).error == EINVAL


def test_info_then_go(connect):
    """E17: INFO(BLOCK_SIZE) and then GO works; all INFO types are answered alike."""
    client = connect()
    info = client.option(INFO, go_body(b"disk", 0, 1, 2, 3, 99))
    go = client.option(GO, go_body(b"disk", 0, 1, 2, 3, 99))
    assert info == go and go[-1][0] == REP_ACK
    bodies = {struct.unpack(">H", body[:2])[0]: body[2:] for _, body in go[:-1]}
    assert bodies[1] == b"disk"
    assert bodies[3] == struct.pack(">III", 1, 4096, 32 << 20)
    assert client.read(0, 8) == pattern(0, 8)


def test_abort(connect):
    """E18: ABORT: ACK and close, data ignored."""
    client = connect()
    assert client.verdict(ABORT, b"whatever") == REP_ACK
    client.expect_closed()


def test_structured_twice_and_extended(connect):
    """E19, E20: STRUCTURED_REPLY twice is harmless; EXTENDED_HEADERS: ACK, takes precedence."""
    client = connect()
    assert client.verdict(STRUCTURED) == REP_ACK
    assert client.verdict(STRUCTURED) == REP_ACK
    assert client.verdict(EXTENDED) == REP_ACK
    assert client.verdict(STRUCTURED) == ERR_EXT_HEADER
    client.extended = True
    client.go()
    assert client.read(4096, 100) == pattern(4096, 100)


def test_export_name_after_extended_headers(connect):
    """EXPORT_NAME must not be used with extended headers: close."""
    client = connect()
    assert client.verdict(EXTENDED) == REP_ACK
    client.send_option(EXPORT_NAME, b"disk")
    client.expect_closed()


def test_a_thousand_options(connect):
    """E21: 1,000 unknown options: closed after 64 to 128."""
    client = connect()
    answered = 0
    with pytest.raises(Closed):
        for _ in range(1000):
            assert client.verdict(0x4444) == ERR_UNSUP
            answered += 1
    assert 64 <= answered <= 128


def test_silent_client(tmp_path, device):
    """E22: a silent client is closed within the handshake's deadline (10 s unless set)."""
    assert Limits().handshake_seconds <= 10
    with ServerThread(tmp_path / "s", device, limits=Limits(handshake_seconds=0.3)) as running:
        with RawClient(running.path) as client:
            client.recv(18)
            client.expect_closed()
        with RawClient(running.path) as client:
            client.greet()
            client.send(b"IHAVE")
            client.expect_closed()
        with RawClient(running.path) as other:
            other.greet().go()


def test_two_views_of_the_server(tmp_path):
    """E26: another tenant's export and no export at all get the same answer."""
    with ServerThread(tmp_path / "a", {"mine": MemoryDevice()}) as running:
        theirs = StaticExports({"theirs": MemoryDevice()})
        running.do(lambda: running.server.listen_unix(tmp_path / "b", theirs))
        with RawClient(tmp_path / "a") as client, RawClient(tmp_path / "b") as other:
            client.greet()
            other.greet()
            assert client.option(INFO, go_body(b"theirs")) == client.option(INFO, go_body(b"no"))
            assert other.verdict(INFO, go_body(b"theirs")) == REP_ACK
            assert [body[4:] for _, body in client.option(LIST)][:1] == [b"mine"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (b"a\0b", ERR_INVALID),
        (b"\xff\xfe", ERR_INVALID),
        (b"../../etc/passwd", ERR_UNKNOWN),
        (b"a" * 4096, ERR_UNKNOWN),
        (b"\x1b[31mred\x1b[0m\n", ERR_UNKNOWN),
    ],
)
def test_hostile_names(connect, caplog, name, kind):
    """E27: hostile names are refused, error texts are short, nothing raw reaches the log."""
    caplog.set_level(0)
    client = connect()
    replies = client.option(GO, go_body(name))
    assert replies[-1][0] == kind and len(replies[-1][1]) <= 4096
    still_works(client)
    assert "\x1b" not in caplog.text


def test_listing(tmp_path):
    """E28: LIST when it is disabled: ERR_POLICY; of too many exports: bounded."""
    disk = MemoryDevice()
    hidden = StaticExports({"disk": disk}, listed=False)
    with ServerThread(tmp_path / "s", hidden) as running, RawClient(running.path) as client:
        client.greet()
        assert client.verdict(LIST) == ERR_POLICY
        client.go()
    many = {f"export-{index}": disk for index in range(10_001)}
    with ServerThread(tmp_path / "s", many) as running, RawClient(running.path) as client:
        client.greet()
        assert client.option(LIST)[-1][0] == ERR_TOO_BIG
        many.pop("export-0")
    with ServerThread(tmp_path / "s", many) as running, RawClient(running.path) as client:
        client.greet()
        assert len(client.option(LIST)) == 10_001


def test_contexts_are_dropped_with_the_name(tmp_path, device):
    """E29: contexts of export A do not hold for B."""
    with (
        ServerThread(tmp_path / "s", {"a": device, "b": MemoryDevice()}) as running,
        RawClient(running.path) as client,
    ):
        client.greet()
        assert client.verdict(STRUCTURED) == REP_ACK
        assert client.verdict(SET_META, meta_body(b"a", b"base:allocation")) == REP_ACK
        client.structured = True
        client.go(b"b")
        assert client.ask(STATUS, 0, 4096).error == EINVAL


def test_context_queries(connect):
    """E30: wildcards list and do not select; no query lists all and selects none."""
    client = connect()
    assert client.verdict(STRUCTURED) == REP_ACK

    def names(option, *queries):
        return [body[4:] for kind, body in client.option(option, meta_body(b"disk", *queries))][:-1]

    everything = [b"base:allocation", b"x-test:parity"]
    assert names(LIST_META) == everything
    assert names(LIST_META, b"base:") == everything[:1]
    assert names(LIST_META, b"x-test:", b"base:") == everything
    assert names(LIST_META, b"x-other:") == []
    assert names(LIST_META, b"base:unknown") == []
    assert names(SET_META) == []
    assert names(SET_META, b"base:") == []
    assert names(SET_META, b"x-other:thing", b"x-test:parity") == everything[1:]
    assert client.verdict(LIST_META, meta_body(b"disk", b"")) == ERR_INVALID
    assert client.verdict(LIST_META, meta_body(b"disk", b"nocolon")) == ERR_INVALID
    ids = [
        body[:4]
        for kind, body in client.option(
            SET_META, meta_body(b"disk", b"base:allocation", *everything)
        )
    ][:-1]
    assert len(ids) == len(set(ids)) == 2


@pytest.mark.parametrize(
    "junk",
    [
        struct.pack(">IIQQI", 0x25609513, 0, 1, 0, 4096),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes.fromhex("16030100c8010000c40303") + bytes(190),
        os.urandom(1 << 20),
    ],
    ids=["oldstyle", "http", "tls", "random"],
)
def test_not_nbd(server, caplog, junk):
    """E31: whoever does not speak the protocol is closed, with one log line at most."""
    caplog.set_level(0)
    with RawClient(server.path) as client:
        client.recv(18)
        try:
            client.send(junk)
            client.expect_closed()
        except Closed:
            pass
    assert len([record for record in caplog.records if record.name.startswith("nbdserver")]) <= 1
    with RawClient(server.path) as client:
        client.greet().go()


def test_byte_by_byte(server):
    """E32: a client that sends byte by byte works, handshake and requests."""
    with RawClient(server.path) as client:
        client.recv(18)
        script = struct.pack(">I", 3)
        for option, body in ((STRUCTURED, b""), (GO, go_body(b"disk"))):
            script += struct.pack(">QII", IHAVEOPT, option, len(body)) + body
        for index in range(len(script)):
            client.send(script[index : index + 1])
        assert client.option_reply()[:2] == (STRUCTURED, REP_ACK)
        while client.option_reply()[1] != REP_ACK:
            pass
        client.structured = True
        for byte in client.pack(READ, 8192, 512) + client.pack(WRITE, 0, 4, payload=b"abcd"):
            client.send(bytes([byte]))
        replies = sorted((client.reply(), client.reply()), key=lambda reply: reply.cookie)
        assert [reply.data for reply in replies] == [pattern(8192, 512), b""]


def test_all_in_one_packet(server):
    """E32: all options and the first requests in one packet work; a half-close ends cleanly."""
    with RawClient(server.path) as client:
        script = struct.pack(">I", 3)
        for option, body in ((LIST, b""), (INFO, go_body(b"disk")), (GO, go_body(b"disk"))):
            script += struct.pack(">QII", IHAVEOPT, option, len(body)) + body
        for index in range(20):
            script += client.pack(READ, index * 4096, 4096)
        client.send(script)
        client.sock.shutdown(socket.SHUT_WR)
        client.recv(18)
        finals = 0
        while finals < 3:
            finals += client.option_reply()[1] == REP_ACK
        for index in range(20):
            assert client.reply().data == pattern(index * 4096, 4096)
        client.expect_closed()


def test_connection_caps(tmp_path, device):
    """E33: caps per socket and in all; those above are closed, others are served."""
    limits = Limits(connections=8, connections_per_listener=5)
    with ServerThread(tmp_path / "a", device, limits=limits) as running:
        second = StaticExports({"disk": device})
        running.do(lambda: running.server.listen_unix(tmp_path / "b", second))
        crowd = [RawClient(tmp_path / "a") for _ in range(5)]
        for client in crowd:
            client.greet().go()
        with RawClient(tmp_path / "a") as refused:
            refused.expect_closed()
        crowd += [RawClient(tmp_path / "b") for _ in range(3)]
        for client in crowd[5:]:
            client.greet().go()
        with RawClient(tmp_path / "b") as refused:
            refused.expect_closed()
        assert crowd[0].read(0, 8) == pattern(0, 8)
        for client in crowd:
            client.close()
        deadline = time.monotonic() + 10
        while running.server.counters.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        with RawClient(tmp_path / "a") as client:
            client.greet().go()
        assert running.server.counters.refused == 2


@pytest.mark.parametrize("rounds", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_clients_that_leave_at_once(tmp_path, rounds):
    """E34: a client that exits between GO and its first command leaves nothing behind."""

    class Counting(StaticExports):
        opened = left = 0

        async def open(self, name):
            self.opened += 1
            return await super().open(name)

        async def leave(self, name, device):
            self.left += 1

    exports = Counting({"disk": MemoryDevice()})
    with ServerThread(tmp_path / "s", exports) as running:
        before = None
        for index in range(rounds):
            if index == 20:
                before = len(os.listdir("/proc/self/fd"))
            with RawClient(running.path) as client:
                client.greet()
                if index % 3 == 0:
                    client.go()
                elif index % 3 == 1:
                    client.send_option(GO, go_body(b"disk"))
        deadline = time.monotonic() + 10
        while running.server.counters.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        running.do(lambda: None)
        gc.collect()
        assert exports.opened == exports.left
        assert not running.server.clients
        assert len(os.listdir("/proc/self/fd")) <= before
