"""How every small record is written: a JSON object with `kind` and `version`, strictly parsed."""

from __future__ import annotations

import json
import re
from typing import Any

from blake3 import blake3

from imagecache.blockimage.seals import MAGIC as SEAL_MAGIC
from imagecache.errors import Corrupt, Denied, Unsupported

MAX_RECORD = 4 << 20


def encode_record(kind: str, fields: dict[str, Any]) -> bytes:
    """A record's JSON bytes, one line."""
    whole = {"kind": kind, "version": 1, **fields}
    return _dumped(whole | {"check": _check(whole)}) + b"\n"


def _dumped(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True).encode()


def _check(fields: dict[str, Any]) -> str:
    """A digest of the other fields: a record is named by what it is of, not by its bytes."""
    return blake3(_dumped(fields)).hexdigest(16)


def decode_record(kind: str, raw: bytes) -> dict[str, Any]:
    """The fields of a record of that kind.

    Raises Corrupt, Unsupported for a newer version, or Denied for one that is sealed still.
    """
    if raw.startswith(SEAL_MAGIC):
        raise Denied(
            f"a {kind} record is sealed and no secrets are configured",
            remedy="set [encryption] secrets to where the realm's secrets are",
        )
    if len(raw) > MAX_RECORD:
        raise Corrupt(f"a {kind} record of {len(raw)} bytes is over the format's cap")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"a {kind} record is not JSON") from error
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        raise Corrupt(f"not a {kind} record")
    try:
        fields.pop("check", None)
        right = _dumped(fields | {"check": _check(fields)}) + b"\n" == raw  # one form, no other
    except (ValueError, RecursionError):  # what JSON can say and cannot be written again
        right = False
    if not right:
        raise Corrupt(f"a {kind} record does not match its check")
    if fields.get("version") != 1:
        raise Unsupported(
            f"a {kind} record of version {fields.get('version')}", remedy="needs a newer cubecache"
        )
    return fields


def text(fields: dict[str, Any], name: str) -> str:
    """A field that is a text; Corrupt."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise Corrupt(f"a {fields['kind']} record's {name} is not a text")
    return value


def match(fields: dict[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    """A field that is a text of that form; Corrupt."""
    value = text(fields, name)
    if not pattern.fullmatch(value):
        raise Corrupt(f"a {fields['kind']} record's {name} is malformed")
    return value


def texts(fields: dict[str, Any], name: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """A field that is a list of texts of that form; Corrupt."""
    values = fields.get(name)
    if not isinstance(values, list):
        raise Corrupt(f"a {fields['kind']} record's {name} is not a list")
    if not all(isinstance(value, str) and pattern.fullmatch(value) for value in values):
        raise Corrupt(f"a {fields['kind']} record's {name} is malformed")
    return tuple(values)


def number(fields: dict[str, Any], name: str) -> int:
    """A field that is a whole number from 0 to 2^63 - 1; Corrupt."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise Corrupt(f"a {fields['kind']} record's {name} is not a size")
    return value
