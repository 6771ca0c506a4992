"""WWW-Authenticate challenges, token answers and Retry-After: pure parsing.

Sources: RFC 9110 sections 11.6.1 and 10.2.3, docker's token authentication specification.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from imagecache.errors import Rejected
from imagecache.oci.strictjson import parse_object

_SCHEME = re.compile(r"[ \t,]*([A-Za-z][A-Za-z0-9!#$%&'*+.^_`|~-]*)(?:[ \t]+|\Z)")
_PARAMETER = re.compile(
    r"[ \t,]*([A-Za-z0-9!#$%&'*+.^_`|~-]+)[ \t]*=[ \t]*"
    r'(?:"((?:[^"\\]|\\.)*)"|([A-Za-z0-9!#$%&\'*+./:@?=^_`|~-]+))[ \t]*(?=,|\Z)'
)
_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}\Z")
_MAX_HEADER = 16_384
MIN_LIFETIME = 60.0
MAX_LIFETIME = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: the scheme in lower case, and its parameters (names in lower case)."""

    scheme: str
    parameters: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token and how many seconds it may be used for."""

    value: str
    lifetime: float

    def __repr__(self) -> str:
        return f"Token(lifetime={self.lifetime})"


def parse_challenges(headers: Sequence[str]) -> list[Challenge]:
    """The challenges in WWW-Authenticate headers; what is not well formed ends its header."""
    found: list[Challenge] = []
    for header in headers:
        rest = header[:_MAX_HEADER]
        while match := _SCHEME.match(rest):
            rest = rest[match.end() :]
            parameters: dict[str, str] = {}
            while parameter := _PARAMETER.match(rest):
                quoted, bare = parameter[2], parameter[3]
                content = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
                parameters.setdefault(parameter[1].lower(), content)
                rest = rest[parameter.end() :]
            found.append(Challenge(match[1].lower(), parameters))
    return found


def parse_token(raw: bytes, *, limit: int, what: str) -> Token:
    """A token server's answer; raises `Rejected`.

    `token` and `access_token` are equal names; `expires_in` is clamped to 60 seconds .. 1 day,
    and is 60 seconds where it is absent or not a number.
    """
    members = parse_object(raw, limit=limit, what=what)
    value = members.get("token") or members.get("access_token")
    if not isinstance(value, str) or not _TOKEN.match(value):
        raise Rejected(f"{what} holds no usable token")
    lifetime = members.get("expires_in")
    if not isinstance(lifetime, int | float) or isinstance(lifetime, bool):
        lifetime = MIN_LIFETIME
    return Token(value, float(min(max(lifetime, MIN_LIFETIME), MAX_LIFETIME)))


def retry_delay(
    header: str | None,
    *,
    attempt: int,
    now: datetime,
    jitter: float,
    backoff: float,
    backoff_cap: float,
    header_cap: float,
) -> float:
    """Seconds to wait before another attempt (0 is the first), in the server's words or ours.

    Retry-After in seconds or as a date is obeyed up to `header_cap`; else the wait doubles
    from `backoff` up to `backoff_cap`. `jitter` in 0..1 adds up to a quarter to either.
    """
    asked: float | None = None
    if header is not None:
        stripped = header.strip()[:64]
        if stripped.isascii() and stripped.isdigit():
            asked = float(stripped)
        else:
            try:
                at = parsedate_to_datetime(stripped)
            except (ValueError, TypeError, IndexError, OverflowError):
                at = None
            if at is not None:
                at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
                asked = (at - now).total_seconds()
    if asked is not None:
        return min(max(asked, 0.0), header_cap) * (1 + jitter / 4)
    return min(backoff * 2.0 ** min(attempt, 32), backoff_cap) * (1 + jitter / 4)
