"""The daemon's jobs, in SQLite, so that they outlive it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from imagecache.errors import Denied
from imagecache.statetable import set_aside, with_table

T = TypeVar("T")
_AS_JSON = ("result", "error", "related")
_STATES = ("queued", "paused", "running", "done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job as it is kept; times in seconds since the epoch."""

    id: str
    reference: str
    platform: str | None
    face: str
    owner: str
    priority: int
    pin_seconds: int
    state: str
    attempts: int
    submitted: float
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    related: list[str] | None = None  # images whose chunks are used again
    bytes_per_second: int = 0
    warm: str = ""


_COLUMNS: dict[str, type] = dict.fromkeys(JobRow.__slots__, str) | {
    "priority": int,
    "pin_seconds": int,
    "bytes_per_second": int,
    "attempts": int,
    "submitted": float,
}


class JobTable:
    """Blocking; called from threads one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _with(self, work: Callable[[Any], T]) -> T:
        return with_table(self._path, "jobs", _COLUMNS, "id", work)

    def load(self) -> list[JobRow]:
        """Every job, oldest first; a table that is not one is set aside and begun anew."""
        try:
            return self._with(
                lambda table: [_row(found) for found in table.rows_where(order_by="submitted")]
            )
        except (sqlite3.DatabaseError, Denied, TypeError, ValueError) as error:
            set_aside(self._path, error)
            return []

    def save(self, rows: Sequence[JobRow]) -> None:
        """Adds or replaces jobs, all or none; durable when it returns."""
        names = ", ".join(JobRow.__slots__)
        places = ", ".join("?" * len(JobRow.__slots__))
        kept = [
            tuple((asdict(row) | {n: _text(getattr(row, n)) for n in _AS_JSON}).values())
            for row in rows
        ]

        def work(table: Any) -> None:
            with table.db.conn as transaction:
                transaction.executemany(
                    f"insert or replace into jobs ({names}) values ({places})", kept
                )

        self._with(work)

    def drop(self, identities: Sequence[str]) -> None:
        """Forgets jobs."""

        def work(table: Any) -> None:
            with table.db.conn:
                for identity in identities:
                    table.delete_where("id = ?", [identity])

        self._with(work)


def _text(value: object) -> str | None:
    return None if value is None else json.dumps(value)


def _row(found: dict[str, Any]) -> JobRow:
    for name in _AS_JSON:
        found[name] = None if found[name] is None else json.loads(found[name])
    found["bytes_per_second"] = found["bytes_per_second"] or 0
    found["warm"] = found["warm"] or ""
    if found["state"] not in _STATES:
        raise ValueError(found["state"])
    return JobRow(**found)
