"""Records are named by what they are of, so their own check has to find any damage."""

from __future__ import annotations

import json

import pytest

from imagecache.blockimage.jsonrecord import decode_record, encode_record
from imagecache.blockimage.records import RootRecord
from imagecache.errors import Corrupt, Unsupported

pytestmark = pytest.mark.quick

ROOT = RootRecord(
    "default", 3, "sha256:" + "a" * 64, "erofs", "{}", 1, "linux/amd64", "sha256:" + "b" * 64,
    "c" * 64, "d" * 64, ("sha256:" + "e" * 64,), ("03000000" + "f" * 64,), 4096, 1, 77,
)  # fmt: skip


def test_every_flipped_bit_of_a_record_is_found() -> None:
    """D1: a digit that became another digit is as wrong as a brace that went."""
    raw = ROOT.encode()
    assert RootRecord.decode(raw) == ROOT
    for at in range(len(raw) - 1):
        for bit in range(8):
            damaged = raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :]
            with pytest.raises(Corrupt):
                RootRecord.decode(damaged)
    for end in range(len(raw) - 1):
        with pytest.raises(Corrupt):
            RootRecord.decode(raw[:end])


def test_newer_version_is_named_only_where_it_is_true() -> None:
    """D4: a record of a newer version is told from one whose version was damaged."""
    newer = json.loads(encode_record("root", {"version": 2}))
    with pytest.raises(Unsupported, match="version 2"):
        decode_record("root", json.dumps(newer).encode() + b"\n")
    newer["version"] = 3
    with pytest.raises(Corrupt, match="check"):
        decode_record("root", json.dumps(newer).encode())
