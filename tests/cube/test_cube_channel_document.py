"""PROTOCOL.md, the host's numbers and the agent's are one set of numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cube import configdisk, frames
from cube.configdisk import MAGIC, SYNC_KEY_BYTES
from cube.volumes import VolumeKind

pytestmark = pytest.mark.quick

PACKAGE = Path(frames.__file__).parent
TEXT = (PACKAGE / "PROTOCOL.md").read_text()
C = "".join((PACKAGE / "agent" / name).read_text() for name in
            ("channel.h", "request.h", "config.h", "podconfig.c", "process.h"))  # fmt: skip
NUMBERS = {name: int(value) for name, value in re.findall(r"\b([A-Z][A-Z0-9_]+) = (\d+)\b", C)}
DEFINES = dict(re.findall(r"^#define ([A-Z0-9_]+) (.+?)u?(?: .*)?$", C, re.MULTILINE))


def rows(after: str) -> dict[str, str]:
    """First and second cells of the table that follows this line."""
    lines = TEXT.partition(after)[2].splitlines()
    table = []
    for line in lines:
        if re.match(r"\| \d", line):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            break
    return {row[0]: row[1] for row in table}


def test_frames_have_the_same_numbers_everywhere():
    named = {kind.name: kind.value for kind in frames.FrameType}
    table = {name: int(number) for number, name in rows("| type | name |").items()}
    assert table == {name: value for name, value in named.items() if value > 0}
    agent = {name: value for name, value in NUMBERS.items() if name.startswith("FRAME_")}
    assert {name.removeprefix("FRAME_"): value for name, value in agent.items()} == named


def test_record_keys_have_the_same_numbers_in_host_and_agent():
    agent = {
        name.removeprefix("KEY_"): value
        for name, value in NUMBERS.items()
        if name.startswith("KEY_")
    }
    assert agent == {key.name: key.value for key in frames.Key}
    covered = set()
    for cell in rows("| key | in a frame's record |"):
        covered |= {int(number) for number in re.findall(r"\d+", cell)}
    assert covered >= {key.value for key in frames.Key}


def test_configuration_keys_have_the_same_numbers_in_host_and_agent():
    body = {f"CONFIG_{key.name}": key.value for key in configdisk._Key}
    container = {f"CONTAINER_{key.name}": key.value for key in configdisk._ContainerKey}
    for name, value in {**body, **container}.items():
        assert NUMBERS[name] == value, name
    assert {f"VOLUME_{kind.name}": kind.value for kind in VolumeKind}.items() <= NUMBERS.items()
    short = {"SIZE_BYTES": "SIZE", "FILE_SYSTEM": "FS"}
    for key in configdisk._VolumeKey:
        assert NUMBERS[f"VOL_{short.get(key.name, key.name)}"] == key.value
    for key in configdisk._MountKey:
        assert NUMBERS[f"MOUNT_{key.name}"] == key.value
    for key in configdisk._FileKey:
        assert NUMBERS[f"FILE_{key.name}"] == key.value
    for key in configdisk._InterfaceKey:
        assert NUMBERS[f"IF_{key.name}"] == key.value


def test_limits_are_the_same_in_host_and_agent():
    assert MAGIC.decode() in TEXT
    assert int(DEFINES["PROTOCOL_VERSION"]) == frames.PROTOCOL_VERSION
    assert f"Version {frames.PROTOCOL_VERSION}." in TEXT
    assert int(DEFINES["PAYLOAD_LIMIT"]) == frames.PAYLOAD_LIMIT
    assert int(DEFINES["SYNC_KEY_BYTES"]) == SYNC_KEY_BYTES
    for name in ("CONTAINER_LIMIT", "MODULE_SET_LIMIT", "INTERFACE_LIMIT", "VOLUME_LIMIT",
                 "FILE_LIMIT", "MOUNT_LIMIT"):  # fmt: skip
        assert int(DEFINES[name]) == getattr(configdisk, name), name
    assert f"#define OUTPUT_WINDOW ({frames.OUTPUT_WINDOW >> 10}u << 10)" in C
    assert f"#define INPUT_WINDOW ({frames.INPUT_WINDOW >> 10}u << 10)" in C
