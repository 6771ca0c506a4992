"""A small SQLite table of the state directory: opened, made if missing, closed; errors mapped."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import sqlite_utils

from imagecache.errors import Denied, NoSpace

T = TypeVar("T")


def with_table(
    path: Path, name: str, columns: Mapping[str, Any], key: str, work: Callable[[Any], T]
) -> T:
    """What `work` makes of the table; what it writes is durable when this returns. Blocking.

    Raises NoSpace or Denied where the file cannot be used, sqlite3.DatabaseError where it is no
    database.
    """
    try:
        database = sqlite_utils.Database(path)
        try:
            database.conn.execute("pragma synchronous=full")
            if name not in database.table_names():
                database.table(name).create(dict(columns), pk=key)
            table = database.table(name)
            for column in columns.keys() - table.columns_dict.keys():
                table.add_column(column, columns[column])  # an older version's table
            return work(table)
        finally:
            database.conn.close()
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise NoSpace(f"{path}: {error}", remedy="free disk space") from error
        raise Denied(f"{path}: {error}") from error
