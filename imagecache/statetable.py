"""A small SQLite table of the state directory: opened, made if missing, closed; errors mapped."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import sqlite_utils

from imagecache.errors import Denied, NoSpace

log = logging.getLogger(__name__)
T = TypeVar("T")


def with_table(
    path: Path, name: str, columns: Mapping[str, Any], key: str, work: Callable[[Any], T]
) -> T:
    """What `work` makes of the table; what it writes is durable when this returns. Blocking.

    Columns that an older version's table has not are added, empty. Raises NoSpace or Denied where
    the file cannot be used, sqlite3.DatabaseError where it is no database, or has columns that
    this version does not know.
    """
    try:
        database = sqlite_utils.Database(path)
        try:
            database.conn.execute("pragma synchronous=full")
            if name not in database.table_names():
                database.table(name).create(dict(columns), pk=key)
            table = database.table(name)
            unknown = table.columns_dict.keys() - columns.keys()
            if unknown:
                raise sqlite3.DatabaseError(f"{name} has the unknown columns {sorted(unknown)}")
            for column in columns.keys() - table.columns_dict.keys():
                table.add_column(column, columns[column])  # an older version's table
            return work(table)
        finally:
            database.conn.close()
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise NoSpace(f"{path}: {error}", remedy="free disk space") from error
        raise Denied(f"{path}: {error}") from error


def set_aside(path: Path, reason: Exception) -> None:
    """Renames what cannot be used as a table to NAME.damaged, and says so. Blocking; Denied.

    Its journals go with it: SQLite would apply them to whatever has the name next.
    """
    target = path.with_suffix(".damaged")
    number = 0
    while os.path.lexists(target):
        number += 1
        target = path.with_suffix(f".damaged-{number}")
    log.warning("%s is set aside as %s: %s", path, target.name, reason)
    try:
        path.rename(target)
        for suffix in ("-journal", "-wal", "-shm"):
            beside = path.with_name(path.name + suffix)
            if os.path.lexists(beside):
                beside.rename(target.with_name(target.name + suffix))
    except OSError as error:
        raise Denied(f"{path} cannot be renamed: {error.strerror}") from error
