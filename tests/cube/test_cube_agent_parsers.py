"""The agent's parsers of pods and of requests, built with sanitizers, against hostile bytes."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cube.channel.messages import ExecSpec, encode_connect, encode_exec, encode_size
from cube.configdisk import HEADER, MAGIC, GuestConfig, encode_config, new_sync_key
from cube.container import ContainerSpec
from cube.frames import FrameType, Key, encode
from cube.guest.agent import SOURCE
from cube.records import field, number, text
from cube.volumes import Interface, Mount, Volume, VolumeFile, VolumeKind
from imagecache.errors import LimitExceeded, UsageError

MAIN = ContainerSpec(("sh",), (), "", "", mounts=(Mount("v", "/data", "a/b"),))
WHOLE = GuestConfig(
    (MAIN,),
    interfaces=(Interface("52:54:00:00:00:01", addresses=("10.0.0.2/24", "fd00::2/64")),),
    volumes=(
        Volume("f", VolumeKind.FILES, files=(VolumeFile("x/y", 0o400, b"1"),)),
        Volume("v", VolumeKind.NFS, source="10.0.0.1:/x", options="vers=4.1", gid=0),
    ),
    tools_disk="tools",
    sync_key=new_sync_key(),
)


@pytest.fixture(scope="session")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parsers")
    target = out / "check-parsers"
    subprocess.run(
        ["make", "--silent", "-C", str(SOURCE), f"OUT={out}", str(target)],
        check=True,
        timeout=300,
    )
    return target


def ask(parsers: Path, directory: Path, kind: str, *contents: bytes) -> list[str]:
    paths = []
    for index, content in enumerate(contents):
        path = directory / f"input-{index}"
        path.write_bytes(content)
        paths.append(str(path))
    words = (kind, KEY) if kind == "channel" else (kind,)
    result = subprocess.run([str(parsers), *words, *paths], capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    return result.stdout.decode(errors="replace").splitlines()


def disk(body: bytes) -> bytes:
    return HEADER.pack(MAGIC, len(body), zlib.crc32(body)) + body


def test_host_and_agent_agree_about_pods(parsers, tmp_path):
    [answer] = ask(parsers, tmp_path, "config", encode_config(WHOLE))
    assert answer.endswith(
        " volume=f/1/1 volume=v/4/0 interface=eth0/2 mount=1:/data"
    ), answer  # fmt: skip


def container(*fields: bytes) -> bytes:
    needed = number(1, 1) + text(3, "root-1") + text(4, "erofs") + text(7, "sh")
    return field(5, needed + b"".join(fields), critical=True)


def mount(volume: str = "v", path: str = "/d", sub_path: str = "") -> bytes:
    return container(field(14, text(1, volume) + text(2, path) + text(3, sub_path)))


def volume(*fields: bytes) -> bytes:
    return field(8, text(1, "v") + number(2, 2) + b"".join(fields))


def file(path: str, mode: int = 0o644) -> bytes:
    return volume(field(12, text(1, path) + number(2, mode)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (mount(), "volume that is not there"),
        (volume() + mount(path="d"), "not absolute"),
        (volume() + mount(path="/a/../b"), "not absolute and plain"),
        (volume() + mount(path="/"), "whole root"),
        (volume() + mount(sub_path="../x"), "leads out"),
        (volume() + mount(sub_path="/x"), "leads out"),
        (volume() + container(field(14, text(1, "v"))), "lacks its volume or path"),
        (file("../x") + container(), "leads out of the volume"),
        (file("a//b") + container(), "leads out of the volume"),
        (file("x" * 256) + container(), "leads out of the volume"),
        (file("x", 0o10000) + container(), "impossible mode"),
        (volume(number(9, 0o10000)) + container(), "impossible mode"),
        (volume(text(3, "x" * 3)) + container(), "size is malformed"),
        (field(8, text(1, "v") + number(2, 7)) + container(), "kind that this agent does not"),
        (field(8, text(1, "v")) + container(), "lacks its name or kind"),
        (field(7, text(1, "m")) + container(), "hardware address or name"),
        (field(7, b"".join([text(3, "a")] * 9)) + container(), "too many addresses"),
        (field(10, b"short") + container(), "sync key"),
        (volume() * 65 + container(), "too many volumes"),
        (volume(*[field(12, text(1, "a"))] * 4097) + container(), "too many files"),
        (container(*[number(21, 5)] * 65), "too many groups"),
        (container(*[field(14, b"")] * 65), "too many mounts"),
        (container(number(99, 1, critical=True)), "does not know"),
    ],
)
def test_broken_pods_are_refused(parsers, tmp_path, body, reason):
    [answer] = ask(parsers, tmp_path, "config", disk(body))
    assert answer.startswith("error ")
    assert reason in answer


FIELD = st.builds(
    lambda key, value, lie, flags: (
        struct.pack("<HHI", key, flags, max(0, len(value) + lie)) + value
    ),
    st.integers(0, 24),
    st.binary(max_size=20) | st.sampled_from([b"v", b"/d", b"a/b", b"..", bytes(8), b"\1" * 4]),
    st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1, 1 << 20]),
    st.sampled_from([0, 0, 0, 0, 1]),
)
FIELDS = st.lists(FIELD, max_size=8).map(b"".join)
BODY = st.lists(
    st.one_of(
        FIELD,
        FIELDS.map(lambda fields: field(8, text(1, "v") + number(2, 1) + field(12, fields))),
        FIELDS.map(lambda fields: field(8, text(1, "w") + number(2, 3) + fields)),
        FIELDS.map(lambda fields: field(7, fields)),
        FIELDS.map(lambda fields: container(fields, field(14, text(1, "v") + fields))),
    ),
    max_size=6,
).map(b"".join)
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(bodies=st.lists(BODY, min_size=20, max_size=20))
def test_no_bytes_break_the_parser_of_pods(parsers, tmp_path, bodies):
    assert len(ask(parsers, tmp_path, "config", *map(disk, bodies))) == len(bodies)


def test_host_and_agent_agree_about_requests(parsers, tmp_path):
    spec = ExecSpec(7, ("a", "b", "c"), ("X=1",), "u", "/", tty=True, rows=3, cols=4)
    answers = ask(
        parsers, tmp_path, "request", encode_exec(spec), encode_connect(80), encode_size(9, 8)
    )
    assert answers == [
        "ok container=7 args=3 env=1 port=0 size=3x4 tty=1",
        "ok container=0 args=0 env=0 port=80 size=0x0 tty=0",
        "ok container=0 args=0 env=0 port=0 size=9x8 tty=0",
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (text(Key.VARIABLE, "x"), "NAME=VALUE"),
        (text(Key.ARGUMENT, "a\0"), "NUL"),
        (text(Key.USER, "a") * 2, "twice"),
        (number(Key.PORT, 65536), "out of bounds"),
        (number(Key.CONTAINER, 1 << 32), "out of bounds"),
        (text(Key.PORT, "abc"), "wrong width"),
        (text(Key.ARGUMENT, "a") * 4097, "too many arguments"),
        (text(Key.VARIABLE, "a=") * 4097, "too many variables"),
        (number(99, 1, critical=True), "does not know"),
        (number(99, 1) + b"cut", "cut off"),
    ],
)
def test_broken_requests_are_refused(parsers, tmp_path, record, reason):
    [answer] = ask(parsers, tmp_path, "request", record)
    assert answer.startswith("error ")
    assert reason in answer


@FUZZ
@given(records=st.lists(FIELDS | st.binary(max_size=60), min_size=20, max_size=20))
def test_no_bytes_break_the_parser_of_requests(parsers, tmp_path, records):
    assert len(ask(parsers, tmp_path, "request", *records)) == len(records)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (GuestConfig((MAIN,)), UsageError),
        (GuestConfig((MAIN,), volumes=WHOLE.volumes * 2), UsageError),
        (GuestConfig((MAIN,), volumes=WHOLE.volumes, sync_key=b"x"), UsageError),
        (GuestConfig((MAIN,), interfaces=WHOLE.interfaces * 9), LimitExceeded),
        (GuestConfig((MAIN,), volumes=WHOLE.volumes * 33), LimitExceeded),
    ],
)
def test_pods_that_no_agent_could_read_are_refused(config, error):
    with pytest.raises(error):
        encode_config(config)


def test_sync_keys_never_repeat_their_first_byte():
    for _ in range(2000):
        key = new_sync_key()
        assert len(key) == 16
        assert key[0] not in key[1:]


KEY = "Kabcdefghijklmno"
SENT = st.builds(
    lambda kind, stream, process, payload: (kind, stream, process, payload),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(0, 1 << 31),
    st.binary(max_size=60),
)


def told(frames: list[tuple[int, int, int, bytes]]) -> str:
    return "".join(f" {k}/{s}/{p}/{len(body)}/{sum(body)}" for k, s, p, body in frames)


def raw(frames: list[tuple[int, int, int, bytes]]) -> bytes:
    return b"".join(struct.pack("<IHHI", len(body), k, s, p) + body for k, s, p, body in frames)


CONVERSATION = st.tuples(
    st.lists(SENT, max_size=4),
    st.integers(0, 200),
    st.binary(min_size=32, max_size=32),
    st.lists(SENT, max_size=4),
)


@FUZZ
@given(conversation=CONVERSATION)
def test_agent_finds_a_new_host_wherever_the_old_one_was_cut(parsers, tmp_path, conversation):
    before, cut, nonce, after = conversation
    old = raw(before)[:cut]
    [answer] = ask(parsers, tmp_path, "channel", old + KEY.encode() + nonce + raw(after))
    heard, _, rest = answer.partition(f" 0/0/0/32/{sum(nonce)}")
    assert rest == told(after)
    # A frame that was cut may have been completed by the key's first bytes.
    whole = heard.split()[1:]
    assert whole[:-1] == told(before).split()[: max(0, len(whole) - 1)]


@FUZZ
@given(contents=st.lists(st.binary(max_size=300), min_size=20, max_size=20))
def test_no_bytes_break_the_agents_channel(parsers, tmp_path, contents):
    assert len(ask(parsers, tmp_path, "channel", *contents)) == len(contents)


async def test_agent_takes_one_host_after_the_other(parsers, tmp_path):
    path = tmp_path / "vsock"
    served = await asyncio.create_subprocess_exec(str(parsers), "listen", str(path), "3")
    async with asyncio.timeout(60):
        while not path.exists():
            await asyncio.sleep(0.01)
        for number_, greeting in enumerate((b"first", b"again", b"again")):
            for _ in range(1000):
                with contextlib.suppress(ConnectionRefusedError):
                    reader, writer = await asyncio.open_unix_connection(str(path))
                    break
                await asyncio.sleep(0.01)
            assert await reader.readexactly(17) == encode(FrameType.HELLO, payload=greeting)
            frame = encode(FrameType.PING, process=number_, payload=bytes(5000))
            writer.write(frame + frame[: 100 * number_])  # the last one is cut off
            assert await reader.readexactly(len(frame)) == frame
            writer.close()
        assert await served.wait() == 0
