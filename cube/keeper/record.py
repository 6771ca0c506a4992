"""The keeper's record in SQLite: pods, their machines, sets. It outlives every process.

Blocking; the keeper calls it from one thread. Private to its owner: pods hold secrets.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import ValidationError

from cube.keeper.status import PodStatus
from cube.pod.model import Pod, PodSet
from imagecache.errors import Corrupt, Denied, NoSpace

T = TypeVar("T")
_SCHEMA_VERSION: Final = 1
_TABLES: Final = (
    "create table if not exists pods (uid text primary key, key text unique not null,"
    " spec text not null, status text not null, machine text, stopped integer not null)",
    "create table if not exists sets (key text primary key, spec text not null)",
)


@dataclass(frozen=True, slots=True)
class MachineRow:
    """A machine that runs: enough for a later keeper to take it over."""

    process: int
    started: int  # clock ticks, `cube.vm.adopted.process_start`
    sync_key: str  # hexadecimal
    exports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PodRow:
    """One pod as recorded. `stopped`: its owner wants it down."""

    pod: Pod
    status: PodStatus
    machine: MachineRow | None = None
    stopped: bool = False


class Record:
    """The database; opened by its one owner."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def open(self) -> None:
        """Opens or makes the database; raises Denied, NoSpace, Corrupt."""

        def work() -> None:
            if not self._path.exists():
                os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600))
            # One thread at a time uses it, not always the same one.
            self._database = sqlite3.connect(self._path, check_same_thread=False)
            self._database.execute("pragma journal_mode=wal")
            self._database.execute("pragma synchronous=normal")
            (version,) = self._database.execute("pragma user_version").fetchone()
            if version not in (0, _SCHEMA_VERSION):
                raise Corrupt(f"{self._path} is of a newer version ({version})")
            for table in _TABLES:
                self._database.execute(table)
            self._database.execute(f"pragma user_version={_SCHEMA_VERSION}")
            self._database.commit()

        self._guarded(work)

    def close(self) -> None:
        """Closes it."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def pods(self) -> list[PodRow]:
        """All pods, in the order of their making."""

        def work() -> list[PodRow]:
            rows = self._connection.execute(
                "select spec, status, machine, stopped from pods order by rowid"
            ).fetchall()
            return [_pod_row(*row) for row in rows]

        return self._guarded(work)

    def save(self, row: PodRow) -> None:
        """Adds or replaces a pod."""
        machine = None
        if row.machine is not None:
            kept = row.machine
            machine = json.dumps([kept.process, kept.started, kept.sync_key, *kept.exports])
        self._write(
            "insert into pods values (?, ?, ?, ?, ?, ?) on conflict (uid) do update set"
            " key=excluded.key, spec=excluded.spec, status=excluded.status,"
            " machine=excluded.machine, stopped=excluded.stopped",
            row.status.uid,
            row.pod.key,
            row.pod.model_dump_json(),
            row.status.model_dump_json(),
            machine,
            int(row.stopped),
        )

    def forget(self, uid: str) -> None:
        """Removes a pod."""
        self._write("delete from pods where uid=?", uid)

    def sets(self) -> list[PodSet]:
        """All sets."""

        def work() -> list[PodSet]:
            rows = self._connection.execute("select spec from sets order by rowid").fetchall()
            return [PodSet.model_validate_json(spec) for (spec,) in rows]

        return self._guarded(work)

    def save_set(self, wanted: PodSet) -> None:
        """Adds or replaces a set."""
        self._write(
            "insert into sets values (?, ?) on conflict (key) do update set spec=excluded.spec",
            wanted.key,
            wanted.model_dump_json(),
        )

    def forget_set(self, key: str) -> None:
        """Removes a set."""
        self._write("delete from sets where key=?", key)

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._database is None:
            raise Denied(f"{self._path} is closed")
        return self._database

    def _write(self, statement: str, *values: str | int | None) -> None:
        def work() -> None:
            with self._connection:
                self._connection.execute(statement, values)

        self._guarded(work)

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                raise NoSpace(f"{self._path}: {error}", remedy="free disk space") from error
            raise Denied(f"{self._path}: {error}") from error
        except (sqlite3.DatabaseError, ValidationError, ValueError, TypeError) as error:
            raise Corrupt(
                f"{self._path} is damaged: {error}",
                remedy="move it away; machines that run are then reported as orphans",
            ) from error
        except OSError as error:
            raise Denied(f"{self._path}: {error.strerror}") from error


def _pod_row(spec: str, status: str, machine: str | None, stopped: int) -> PodRow:
    kept = None
    if machine is not None:
        process, started, sync_key, *exports = json.loads(machine)
        kept = MachineRow(int(process), int(started), str(sync_key), tuple(exports))
    return PodRow(
        Pod.model_validate_json(spec),
        PodStatus.model_validate_json(status),
        kept,
        bool(stopped),
    )
