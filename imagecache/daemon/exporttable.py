"""The exports that a daemon keeps, in SQLite, so that they are there again after a restart."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlite_utils

from imagecache.errors import Denied, NoSpace

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """One export: an NBD name bound to a block image, alone on a socket of its own or not."""

    name: str
    reference: str
    image: str
    config: str  # the run configuration as JSON text
    face: str
    block_image: str
    locations: str
    realm: str
    generation: int
    size_bytes: int
    socket: str | None
    fill: str | None
    owner: str | None = None


class ExportTable:
    """Blocking; called from threads one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _with(self, work: Callable[[Any], T]) -> T:
        try:
            database = sqlite_utils.Database(self._path)
            try:
                database.conn.execute("pragma synchronous=full")
                if "exports" not in database.table_names():
                    columns = dict.fromkeys(ExportRecord.__slots__, str) | {
                        "size_bytes": int,
                        "generation": int,
                    }
                    database.table("exports").create(columns, pk="name")
                return work(database.table("exports"))
            finally:
                database.conn.close()
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise NoSpace(f"{self._path}: {error}", remedy="free disk space") from error
            raise Denied(f"{self._path}: {error}") from error

    def load(self) -> list[ExportRecord]:
        """Every export, by name; a table that is not a database is set aside and begun anew."""
        try:
            return self._with(
                lambda table: [ExportRecord(**row) for row in table.rows_where(order_by="name")]
            )
        except (sqlite3.DatabaseError, TypeError):
            self._path.replace(self._path.with_suffix(".damaged"))
            return []

    def save(self, record: ExportRecord) -> None:
        """Adds or replaces one export; durable when it returns."""
        self._with(lambda table: table.upsert(asdict(record), pk="name", alter=True))

    def drop(self, name: str) -> None:
        """Removes one export."""
        self._with(lambda table: table.delete_where("name = ?", [name]))
