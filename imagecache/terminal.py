"""What commands print: results on stdout (text or JSON), progress and notes on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click

_REDRAW_SECONDS = 0.1


def size_text(count: float) -> str:
    """A byte count for people: `12.3 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def table_text(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as columns, padded; the first row is the heading."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


@dataclass(slots=True)
class Terminal:
    """One command's output; progress is drawn only where stderr is a terminal."""

    json: bool = False
    _drawn: float = 0.0
    _open_line: bool = False
    _rates: dict[str, tuple[float, int]] = field(default_factory=dict)

    def answer(self, value: Any, text: str) -> None:
        """The command's result: `value` as one JSON line, or `text` for people."""
        self.end_progress()
        if self.json:
            click.echo(json.dumps(value))
        elif text:
            click.echo(text)

    def note(self, text: str) -> None:
        """A line for people, on stderr."""
        self.end_progress()
        click.echo(text, err=True)

    def progress(self, label: str, done: int, total: int) -> None:
        """Redraws the progress line: bytes, rate since the label began, time left."""
        if not sys.stderr.isatty():
            return
        now = time.monotonic()
        started, base = self._rates.setdefault(label, (now, done))
        if now - self._drawn < _REDRAW_SECONDS and done != total:
            return
        self._drawn = now
        text = label
        if total:
            rate = (done - base) / (now - started) if now > started else 0.0
            text += f"  {size_text(done)} of {size_text(total)}  {size_text(rate)}/s"
            if rate > 0:
                text += f"  {(total - done) / rate:.0f} s left"
        sys.stderr.write("\r\x1b[K" + text)
        sys.stderr.flush()
        self._open_line = True

    def end_progress(self) -> None:
        """Clears the progress line."""
        if self._open_line:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._open_line = False
