"""The exports that a daemon keeps, in SQLite, so that they are there again after a restart."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from imagecache.errors import Denied
from imagecache.statetable import set_aside, with_table

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
    writable: int = 0  # 1: over an overlay


_COLUMNS: dict[str, type] = dict.fromkeys(ExportRecord.__slots__, str) | {
    "size_bytes": int,
    "generation": int,
    "writable": int,
}


_MAY_BE_NONE = ("socket", "fill", "owner")


class ExportTable:
    """Blocking; called from threads one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _with(self, work: Callable[[Any], T]) -> T:
        return with_table(self._path, "exports", _COLUMNS, "name", work)

    def load(self) -> list[ExportRecord]:
        """Every export, by name; a table that is not a database is set aside and begun anew."""
        try:
            return self._with(
                lambda table: [_record(row) for row in table.rows_where(order_by="name")]
            )
        except (sqlite3.DatabaseError, Denied, TypeError, ValueError) as error:
            set_aside(self._path, error)
            return []

    def save(self, record: ExportRecord) -> None:
        """Adds or replaces one export; durable when it returns."""
        self._with(lambda table: table.upsert(asdict(record), pk="name", alter=True))

    def drop(self, name: str) -> None:
        """Removes one export."""
        self._with(lambda table: table.delete_where("name = ?", [name]))


def _record(row: dict[str, Any]) -> ExportRecord:
    row["writable"] = row["writable"] or 0  # a column that older versions had not
    record = ExportRecord(**row)
    for name, kind in _COLUMNS.items():
        value = getattr(record, name)
        if not isinstance(value, kind) and (value is not None or name not in _MAY_BE_NONE):
            raise ValueError(f"export {record.name}: {name} is {value!r}")
    return record
