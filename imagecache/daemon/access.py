"""Who calls the control API and what they may do: tokens, peers of the unix socket, owners.

A caller without an owner sees everything its role allows; one with an owner sees only what that
owner made, and anything else is answered as if it were not there.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
import stat
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from imagecache.errors import CubecacheError, Denied, NotFound, UsageError

MAX_TOKENS_FILE = 1 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_HASH = re.compile(r"[0-9a-f]{64}")
_UCRED = struct.Struct("iII")


class Unauthenticated(CubecacheError):
    """No token, or none that is known: the same answer for both."""


class Role(IntEnum):
    """What a caller may do; each includes the ones before it."""

    READ = 1
    PRELOAD = 2
    ADMIN = 3

    @classmethod
    def parse(cls, text: object) -> Role:
        """`read`, `preload` or `admin`; UsageError."""
        if isinstance(text, str) and text in ("read", "preload", "admin"):
            return cls[text.upper()]
        raise UsageError(f"role {text!r} is unknown", remedy="read, preload or admin")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request; `remote` where they came over TCP."""

    name: str
    role: Role
    owner: str = ""
    remote: bool = False

    def require(self, role: Role, what: str) -> None:
        """Raises Denied where the role does not suffice."""
        if self.role < role:
            raise Denied(f"{what} needs the role {role.name.lower()}", remedy="another token")

    def require_whole(self, what: str) -> None:
        """Raises Denied for a caller with an owner: what is told of the host is of all owners."""
        if self.owner:
            raise Denied(f"{what} are of all owners", remedy="a token without an owner")

    def sees(self, owner: str) -> bool:
        """Whether what this owner made exists for the caller."""
        return not self.owner or owner == self.owner


@dataclass(frozen=True, slots=True)
class _Token:
    name: str
    role: Role
    owner: str
    digest: bytes


class Tokens:
    """The known tokens, by their SHA-256; the tokens themselves are kept nowhere."""

    def __init__(self, known: tuple[_Token, ...] = ()) -> None:
        self._known = known

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Tokens:
        """From `[tokens.NAME]` tables with role, sha256 and, if any, owner; UsageError."""
        tables = document.get("tokens", {})
        if set(document) - {"tokens"} or not isinstance(tables, dict):
            raise UsageError("a tokens file holds [tokens.NAME] tables only")
        known = []
        for name, table in tables.items():
            if not isinstance(table, dict) or set(table) - {"role", "owner", "sha256"}:
                raise UsageError(f"token {name!r} has other keys than role, owner, sha256")
            owner, digest = table.get("owner", ""), table.get("sha256")
            if not isinstance(digest, str) or not _HASH.fullmatch(digest):
                raise UsageError(f"token {name!r} has no sha256 of 64 hexadecimal digits")
            if owner and not (isinstance(owner, str) and _NAME.fullmatch(owner)):
                raise UsageError(f"token {name!r}: owner {owner!r} is malformed")
            role = Role.parse(table.get("role"))
            known.append(_Token(name, role, owner, bytes.fromhex(digest)))
        return cls(tuple(known))

    @classmethod
    def read(cls, path: Path) -> Tokens:
        """The tokens of a file; Denied where others may write it. Blocking."""
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TOKENS_FILE:
                raise UsageError(f"tokens file {path} is not a regular file of at most 1 MiB")
            if status.st_mode & stat.S_IWOTH:
                raise Denied(f"tokens file {path} may be written by anybody", remedy="chmod o-w it")
            return cls.parse(tomllib.loads(path.read_text()))
        except OSError as error:
            raise Denied(f"tokens file {path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"tokens file {path} is not TOML: {error}") from error

    def caller(self, authorization: str | None) -> Caller:
        """Who a header's bearer token is; Unauthenticated. Takes as long for every token (I11)."""
        scheme, _, token = (authorization or "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found: _Token | None = None
        for known in self._known:
            if hmac.compare_digest(known.digest, given):
                found = known
        if found is None or scheme.lower() != "bearer":
            raise Unauthenticated("a known token is needed", remedy="Authorization: Bearer TOKEN")
        return Caller(found.name, found.role, found.owner, remote=True)


def peer_caller(peer: socket.socket, own_uid: int, group_role: Role) -> Caller:
    """Who is at the other end of a unix socket: root and our user may all, others as the group."""
    size = _UCRED.size
    _pid, uid, _gid = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    role = Role.ADMIN if uid in (0, own_uid) else group_role
    return Caller(f"uid {uid}", role)


def hidden(what: str, name: str) -> NotFound:
    """The one answer for what is not there and what is another owner's."""
    return NotFound(f"no {what} {name!r}")
