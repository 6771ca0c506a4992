"""JSON from outside, read strictly: what two parsers could read differently is refused.

Go, Python and JavaScript disagree on duplicate keys, NaN, byte order marks and trailing bytes;
a manifest that means two things is an attack. Source: RFC 8259.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, TypeAlias

from imagecache.errors import LimitExceeded, Rejected

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

MAX_DEPTH = 64
_MAX_NUMBER_CHARS = 40


def parse_json(raw: bytes, *, limit: int, what: str) -> Json:
    """Parse one JSON text of at most `limit` bytes; `what` names it in errors.

    Raises `LimitExceeded` when it is too long or nested deeper than `MAX_DEPTH`, `Rejected`
    for bytes that are not UTF-8, a byte order mark, duplicate keys, NaN and infinities, numbers
    of more than 40 characters, lone surrogates, and anything after the value.
    """
    if len(raw) > limit:
        raise LimitExceeded(f"{what} has more than {limit} bytes of JSON")
    if raw[:3] == b"\xef\xbb\xbf":
        raise Rejected(f"{what} starts with a byte order mark")
    try:
        text = raw.decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        raise Rejected(f"{what} is not UTF-8 (byte {error.start})") from None

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise Rejected(f"{what} has a JSON object with a key twice")
        return members

    def constant(name: str) -> NoReturn:
        raise Rejected(f"{what} has {name}, which is not JSON")

    def integer(digits: str) -> int:
        if len(digits) > _MAX_NUMBER_CHARS:
            raise Rejected(f"{what} has a number of {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        if len(digits) > _MAX_NUMBER_CHARS or not math.isfinite(float(digits)):
            raise Rejected(f"{what} has a number out of range")
        return float(digits)

    try:
        parsed: Json = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_int=integer,
            parse_float=real,
        )
    except RecursionError:
        raise LimitExceeded(f"{what} is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        position = getattr(error, "pos", 0)
        raise Rejected(f"{what} is not JSON (character {position})") from None
    _check_tree(parsed, what)
    return parsed


def parse_object(raw: bytes, *, limit: int, what: str) -> dict[str, Json]:
    """`parse_json` of a text whose value must be an object."""
    parsed = parse_json(raw, limit=limit, what=what)
    if not isinstance(parsed, dict):
        raise Rejected(f"{what} is not a JSON object")
    return parsed


def _check_tree(parsed: Json, what: str) -> None:
    """Refuse depth over `MAX_DEPTH` and strings that are not Unicode text; no recursion."""
    level: list[Any] = [parsed]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below.extend(node.values())
                below.extend(node.keys())
            elif isinstance(node, list):
                below.extend(node)
            elif isinstance(node, str) and not node.isascii():
                _check_text(node, what)
        if not below:
            return
        level = below
    if any(isinstance(node, dict | list) for node in level):
        raise LimitExceeded(f"{what} is nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Rejected(f"{what} has a string with a lone surrogate") from None
