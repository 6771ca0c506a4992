"""The tables of the state directory: whatever stands there, the daemon starts."""

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from imagecache.daemon.exporttable import ExportRecord, ExportTable
from preload.jobtable import JobRow, JobTable

pytestmark = pytest.mark.quick

RECORD = ExportRecord("n", "r", "i", "{}", "erofs", "b", "l", "realm", 1, 2, None, None)
ROW = JobRow("1", "r", None, "erofs", "", 0, 0, "done", 1, 1.0, None, None)
TABLES = [("exports", ExportTable, RECORD), ("jobs", JobTable, ROW)]


def sql(path: Path, *statements: str) -> None:
    database = sqlite3.connect(path)
    for statement in statements:
        database.execute(statement)
    database.commit()
    database.close()


def foreign(path: Path, name: str) -> None:
    sql(path, f"create table {name} (something text)", f"insert into {name} values ('x')")


def newer(path: Path, name: str) -> None:
    sql(path, f"alter table {name} add column later text")


def junk(path: Path, name: str) -> None:
    path.write_bytes(b"no database" * 1000)


def folder(path: Path, name: str) -> None:
    path.unlink()
    (path / "full").mkdir(parents=True)


def odd_values(path: Path, name: str) -> None:
    column = {"exports": "size_bytes", "jobs": "result"}[name]
    sql(path, f"update {name} set {column} = 'x{{'")


@pytest.mark.parametrize(("name", "kind", "one"), TABLES, ids=["exports", "jobs"])
@pytest.mark.parametrize("damage", [foreign, newer, junk, folder, odd_values])
def test_what_is_no_table_of_ours_is_set_aside_with_a_warning(
    tmp_path: Path,
    *,
    name: str,
    kind: type,
    one: object,
    damage: Callable[[Path, str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """H6: twice, so that what was set aside before is kept too."""
    path = tmp_path / f"{name}.db"
    table = kind(path)
    for number in range(2):
        table.save([one] if name == "jobs" else one)
        if damage is foreign:
            path.unlink()
        damage(path, name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert table.load() == []
        assert "set aside" in caplog.text
        table.save([one] if name == "jobs" else one)
        assert table.load() == [one]
        suffix = ".damaged-1" if number else ".damaged"
        assert path.with_suffix(suffix).exists()


@pytest.mark.parametrize(("name", "kind", "one"), TABLES, ids=["exports", "jobs"])
def test_an_older_versions_table_is_completed(
    tmp_path: Path, name: str, kind: type, one: object
) -> None:
    path = tmp_path / f"{name}.db"
    table = kind(path)
    table.save([one] if name == "jobs" else one)
    column = {"exports": "writable", "jobs": "bytes_per_second"}[name]
    sql(path, f"alter table {name} drop column {column}")
    assert table.load() == [one]
    table.save([one] if name == "jobs" else one)
    assert table.load() == [one]
