"""The agent's parsers, built with sanitizers, against hostile bytes."""

from __future__ import annotations

import struct
import subprocess
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cube.configdisk import HEADER, MAGIC, GuestConfig, encode_config
from cube.container import ContainerSpec
from cube.guest.agent import SOURCE
from cube.records import field, number, text
from imagecache.errors import UsageError

GOOD = ContainerSpec(("sh", "-c", "x"), ("A=b", "C=d=e"), "app", "/", name="näme")


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


def disk(body: bytes, *, length: int | None = None, checksum: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return HEADER.pack(MAGIC, size, zlib.crc32(body) if checksum is None else checksum) + body


def ask(parsers: Path, *words: str) -> list[str]:
    result = subprocess.run([str(parsers), *words], capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    return result.stdout.decode(errors="replace").splitlines()


def parse(parsers: Path, directory: Path, *disks: bytes) -> list[str]:
    paths = []
    for index, content in enumerate(disks):
        path = directory / f"disk-{index}"
        path.write_bytes(content)
        paths.append(str(path))
    return ask(parsers, "config", *paths)


def container(*fields: bytes) -> bytes:
    return field(5, b"".join(fields))


NEEDED = (number(1, 1), text(3, "root-1"), text(4, "erofs"), text(7, "sh"))


def test_what_the_host_writes_the_guest_reads(parsers, tmp_path):
    config = GuestConfig((GOOD,), hostname="box", clock_ns=5, resolv_conf=b"r", hosts=b"h")
    assert parse(parsers, tmp_path, encode_config(config)) == [
        "ok hostname=box containers=1 [1 root-1 erofs args=3 env=2 first=sh]"
    ]


def test_module_sets(parsers, tmp_path):
    config = GuestConfig((GOOD,), hostname="box", modules=("nbd", "ext4"))
    [answer] = parse(parsers, tmp_path, encode_config(config))
    assert answer.startswith("ok hostname=box containers=1 modules=nbd modules=ext4 [1 ")
    for modules, words in ((("nbd", "none"), "none do not exist"), (("nbd",) * 17, "more than 16")):
        with pytest.raises(UsageError, match=words):
            encode_config(GuestConfig((GOOD,), modules=modules))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too short"),
        (b"cubecfg2" + bytes(100), "another magic or version"),
        (disk(b"", length=0), "length is out of bounds"),
        (disk(b"x", length=17 << 20), "length is out of bounds"),
        (disk(b"x", length=9), "shorter than its header"),
        (disk(b"x", checksum=0), "checksum"),
        (disk(b"abc"), "cut off"),
        (disk(struct.pack("<HHI", 5, 0, 0xFFFFFFFF)), "cut off"),
        (disk(container(struct.pack("<HHI", 7, 0, 1000))), "cut off"),
        (disk(text(1, "h")), "names no container"),
        (disk(container(*NEEDED[1:])), "lacks its id"),
        (disk(container(*NEEDED[:3])), "no command"),
        (disk(container(*NEEDED[:3], text(7, ""))), "no command"),
        (disk(container(*NEEDED, number(1, 1 << 33))), "id is out of bounds"),
        (disk(container(*NEEDED, field(1, b"abc"))), "wrong width"),
        (disk(container(*NEEDED, field(7, b"a\0b"))), "NUL"),
        (disk(container(*NEEDED, text(8, "no-equals"))), "NAME=VALUE"),
        (disk(container(*NEEDED, text(8, "=value"))), "NAME=VALUE"),
        (disk(container(*NEEDED, number(13, 3))), "PID 1"),
        (disk(container(*NEEDED, text(3, "again"))), "twice"),
        (disk(container(*NEEDED, field(999, b"", critical=True))), "does not know"),
        (disk(container(*NEEDED) + field(999, b"", critical=True)), "does not know"),
        (disk(container(*NEEDED) * 2), "one id"),
        (disk(b"".join(container(number(1, n), *NEEDED[1:]) for n in range(1, 35))), "too many"),
        (disk(b"".join([text(6, "nbd", critical=True)] * 17)), "too many sets"),
        (disk(field(6, b"n\0", critical=True) + container(*NEEDED)), "NUL"),
        (disk(container(*NEEDED, *[text(7, "a")] * 65536)), "too many"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_configurations_are_refused(parsers, tmp_path, content, reason):
    [answer] = parse(parsers, tmp_path, content)
    assert answer.startswith("error ")
    assert reason in answer


def test_unknown_fields_are_skipped(parsers, tmp_path):
    [answer] = parse(parsers, tmp_path, disk(container(*NEEDED, text(999, "x")) + text(77, "y")))
    assert answer.startswith("ok ")


FIELD = st.builds(
    lambda key, value, lie, flags: (
        struct.pack("<HHI", key, flags, max(0, len(value) + lie)) + value
    ),
    st.integers(0, 14),
    st.binary(max_size=40),
    st.sampled_from([0, 0, 0, 0, 1, -1, 1 << 20]),
    st.sampled_from([0, 0, 0, 1]),
)
CONTAINER = st.lists(FIELD | st.sampled_from(NEEDED), max_size=12).map(
    lambda fields: field(5, b"".join(fields))
)
BODY = st.lists(FIELD | CONTAINER, max_size=8).map(b"".join)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(bodies=st.lists(BODY, min_size=20, max_size=20), raw=st.binary(max_size=100))
def test_no_bytes_break_the_configuration_parser(parsers, tmp_path, bodies, raw):
    answers = parse(parsers, tmp_path, *map(disk, bodies), raw)
    assert len(answers) == len(bodies) + 1


PASSWD = (
    "root:x:0:0::/root:/bin/sh\n#comment\nbroken\nu:x:5:6:G:/home/u:/bin/sh\n7:x:8:9::/seven:\n"
)
GROUP = "root:x:0:\nbroken\na:x:10:u,z\nb:x:11:z\nc:x:12:z,u\nsix:x:6:\n"


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("", "ok uid=0 gid=0 home=/root groups=0"),
        ("root", "ok uid=0 gid=0 home=/root groups=0"),
        ("u", "ok uid=5 gid=6 home=/home/u groups=6,10,12"),
        ("5", "ok uid=5 gid=6 home=/home/u groups=6,10,12"),
        ("u:b", "ok uid=5 gid=11 home=/home/u groups=11"),
        ("u:99", "ok uid=5 gid=99 home=/home/u groups=99"),
        ("7", "ok uid=7 gid=0 home=/ groups=0"),
        ("4000", "ok uid=4000 gid=0 home=/ groups=0"),
        (":six", "ok uid=0 gid=6 home=/root groups=6"),
        ("nobody", 'error the image\'s /etc/passwd has no user "nobody"'),
        ("u:nogroup", 'error the image\'s /etc/group has no group "nogroup"'),
        ("4294967295", 'error the image\'s /etc/passwd has no user "4294967295"'),
        ("-1", 'error the image\'s /etc/passwd has no user "-1"'),
        ("x" * 300, "error the user's name is too long"),
    ],
)
def test_users_are_resolved_as_runtimes_do(parsers, tmp_path, wanted, answer):
    (tmp_path / "passwd").write_text(PASSWD)
    (tmp_path / "group").write_text(GROUP)
    files = (str(tmp_path / "passwd"), str(tmp_path / "group"))
    assert ask(parsers, "account", wanted, *files) == [answer]


LINES = st.lists(st.text(alphabet="ax0159:,\n", max_size=30) | st.binary(max_size=20), max_size=6)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(passwd=LINES, group=LINES, wanted=st.text(alphabet="ax0159:,", max_size=10))
def test_no_bytes_break_the_account_parser(parsers, tmp_path, passwd, group, wanted):
    for name, lines in (("passwd", passwd), ("group", group)):
        parts = [line.encode() if isinstance(line, str) else line for line in lines]
        (tmp_path / name).write_bytes(b"\n".join(parts))
    files = (str(tmp_path / "passwd"), str(tmp_path / "group"))
    [answer] = ask(parsers, "account", wanted, *files)
    assert answer.startswith(("ok ", "error "))
