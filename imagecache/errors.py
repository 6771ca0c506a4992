"""The errors of cubecache, one type per thing the caller can do next.

Foreign exceptions (OSError, aiohttp, botocore, json, struct) are mapped to one of these where
they are born. Nothing else crosses a module border. Each border has one table: exit codes in
`EXIT_CODES` below, HTTP statuses in `imagecache.daemon.api`, errno in `imagecache.cache.device`.
"""

from __future__ import annotations

from typing import Any


class CubecacheError(Exception):
    """Base of every expected failure: names the object, and the remedy where one is known."""

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class UsageError(CubecacheError):
    """The request itself is malformed (a reference, an option): the caller must change it."""


class Rejected(CubecacheError):
    """The input's content is broken or hostile: do not retry, the bytes must change."""


class LimitExceeded(Rejected):
    """The input is over a configured limit: raise the limit or shrink the input."""


class NotFound(CubecacheError):
    """We asked, and it is not there."""


class Unavailable(CubecacheError):
    """We could not ask (network, outage, daemon absent): the same call may work later."""


class Denied(CubecacheError):
    """The other side, or the host, refused us: credentials or permissions must change."""


class Corrupt(CubecacheError):
    """Stored bytes do not match their digest: quarantine and fetch or build them again."""


class Busy(CubecacheError):
    """Somebody else holds what we need (lock, lease, attached export): wait, or stop them."""


class NoSpace(CubecacheError):
    """A disk or quota is full: free space."""


class Unsupported(CubecacheError):
    """This host, server or version cannot do it: the remedy says what could."""


# The one table of exit codes (sysexits.h names in comments). 130 is Ctrl-C, 141 a closed stdout.
EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (UsageError, 2),
    (Rejected, 65),  # EX_DATAERR
    (NotFound, 66),  # EX_NOINPUT
    (Unavailable, 69),  # EX_UNAVAILABLE
    (NoSpace, 73),  # EX_CANTCREAT
    (Corrupt, 74),  # EX_IOERR
    (Busy, 75),  # EX_TEMPFAIL
    (Unsupported, 78),  # EX_CONFIG
    (Denied, 77),  # EX_NOPERM
    (CubecacheError, 1),
)


def exit_code(error: BaseException) -> int:
    """The exit code of an error by `EXIT_CODES`; 70 (EX_SOFTWARE) for what is not ours."""
    for kind, code in EXIT_CODES:
        if isinstance(error, kind):
            return code
    return 70


_KINDS: dict[str, type[CubecacheError]] = {
    kind.__name__: kind
    for kind in (
        UsageError,
        Rejected,
        LimitExceeded,
        NotFound,
        Unavailable,
        Denied,
        Corrupt,
        Busy,
        NoSpace,
        Unsupported,
    )
}


def as_record(error: CubecacheError) -> dict[str, Any]:
    """An error as JSON values, for a process border; subclasses travel as their public kind."""
    kind = next(
        (name for base in type(error).__mro__ for name in _KINDS if name == base.__name__),
        "CubecacheError",
    )
    return {"kind": kind, "message": error.message, "remedy": error.remedy}


def from_record(record: dict[str, Any]) -> CubecacheError:
    """The inverse of `as_record`; an unknown kind becomes a plain CubecacheError."""
    kind = _KINDS.get(str(record.get("kind")), CubecacheError)
    remedy = record.get("remedy")
    return kind(str(record.get("message")), remedy=remedy if isinstance(remedy, str) else None)
