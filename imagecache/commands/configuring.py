"""`cubecache config`: what is configured, and where each value comes from."""

from __future__ import annotations

import os
from typing import Any

import click

from imagecache.session import Session, json_option
from imagecache.settings import SETTINGS, Settings
from imagecache.terminal import table_text


@click.group()
def config() -> None:
    """Show and check the configuration.

    One TOML file (--config or CUBECACHE_CONFIG), the environment over it, flags over both.
    """


def rows_of(settings: Settings) -> list[dict[str, Any]]:
    """Every setting as JSON values: name, value, where from, variable, reload, meaning."""
    return [
        {
            "name": row.name,
            "value": _plain(settings.value(row.name)),
            "from": settings.origin(row.name),
            "environment": row.environment,
            "reload": row.reload,
            "meaning": row.text,
        }
        for row in SETTINGS
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


@config.command(
    epilog="\b\nExamples:\n  cubecache config show\n"
    "  CUBECACHE_CACHE_BUDGET_BYTES=5GiB cubecache config show --json"
)
@click.option("--describe", is_flag=True, help="Say what each setting means.")
@json_option
@click.pass_obj
def show(session: Session, *, describe: bool) -> None:
    """Print every setting, its value and where that comes from.

    RELOAD tells what a running daemon takes on SIGHUP.
    """
    rows = rows_of(session.settings)
    heading = ("NAME", "VALUE", "FROM", "RELOAD") + (("VARIABLE", "MEANING") if describe else ())
    table = [heading]
    for row in rows:
        cells = (row["name"], _text(row["value"]), row["from"], "yes" if row["reload"] else "no")
        table.append(cells + ((row["environment"], row["meaning"]) if describe else ()))
    session.terminal.answer(rows, table_text(table))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value) or "-"
    return "-" if value is None else str(value)


@config.command(
    epilog="\b\nExamples:\n  cubecache --config /etc/cubecache/config.toml config check"
)
@json_option
@click.pass_obj
def check(session: Session) -> None:
    """Read the configuration as the daemon would, and say what is wrong with it.

    Exit 2 where a value is unusable, 77 where the file may be written by anybody.
    """
    settings = session.settings
    known = {row.environment for row in SETTINGS} | {"CUBECACHE_CONFIG"}
    sections = tuple(
        {f"CUBECACHE_{row.name.partition('.')[0].upper()}_" for row in SETTINGS if "." in row.name}
    )
    unknown = sorted(name for name in os.environ if name.startswith(sections) and name not in known)
    for name in unknown:
        session.terminal.note(f"cubecache: {name} in the environment sets nothing")
    where = settings.config_file or "no file"
    session.terminal.answer(
        {"config": None if settings.config_file is None else str(where), "unknown": unknown},
        f"ok ({where})",
    )
