"""What `startup.py` measured, as one self-contained HTML page of SVG bars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, BAR, GAP = 760, 110, 16, 5
COLOURS = {
    "pull": "#9a3b3b",
    "fill": "#c98a2b",
    "unlearned": "#b7a53a",
    "predicted": "#6f9a3b",
    "profile": "#2f7d5b",
    "previous": "#2f6a9a",
    "warm": "#7a7a7a",
}
MEASURES = (
    ("ready", "time to ready, s", 1.0, "{:.2f}"),
    ("added", "added delay over warm, s", 1.0, "{:.2f}"),
    ("bytes", "fetched, MB", 1e-6, "{:.1f}"),
    ("gets", "GETs", 1.0, "{:.0f}"),
)


def write_page(sources: Sequence[Path], target: Path) -> None:
    """Draws what the JSON files of one or several runs hold; raises OSError or ValueError."""
    parts = []
    for source in sources:
        measured = json.loads(source.read_text())
        about = measured["about"]
        parts.append(f"<h2>{escape(about['commit'])}</h2><p>{escape(about['machine'])}, load ")
        parts.append(f"{about['load_before']:.1f}</p>")
        parts += [_image(found) for found in measured["found"]]
    style = "body{font:14px sans-serif;max-width:820px;margin:2em auto}text{font:12px sans-serif}"
    target.write_text(
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Time to ready</title>"
        f"<style>{style}</style><h1>Time to ready of real programs</h1>{''.join(parts)}</html>\n"
    )


def _image(found: dict[str, Any]) -> str:
    where = "microVM" if found["vm"] else "lazy mount"
    title = f"{found['image']}: {found['reads']} ({found['link']}, {where})"
    read = f"recorded read set {found['read_bytes'] / 1e6:.1f} MB"
    drawn = [_bars(found["rows"], *measure) for measure in MEASURES]
    return f"<h3>{escape(title)}</h3><p>{read}</p>{''.join(drawn)}"


def _bars(rows: dict[str, dict[str, float]], name: str, text: str, scale: float, shape: str) -> str:
    """One measure of all kinds of starts."""
    values = {kind: max(0.0, row[name] * scale) for kind, row in rows.items()}
    most = max(values.values(), default=0.0) or 1.0
    height = 22 + len(values) * (BAR + GAP)
    bars = [f"<text x='0' y='14' font-weight='bold'>{escape(text)}</text>"]
    for number, (kind, value) in enumerate(values.items()):
        top = 22 + number * (BAR + GAP)
        width = value / most * (WIDTH - LEFT - 80)
        bars.append(f"<text x='0' y='{top + 12}'>{escape(kind)}</text>")
        bars.append(
            f"<rect x='{LEFT}' y='{top}' width='{width:.1f}' height='{BAR}' "
            f"fill='{COLOURS.get(kind, '#555')}'/>"
        )
        label = shape.format(value)
        bars.append(f"<text x='{LEFT + width + 6:.1f}' y='{top + 12}'>{label}</text>")
    return f"<svg width='{WIDTH}' height='{height}' role='img'>{''.join(bars)}</svg>"
