"""A report as one HTML page: no script, no outside asset, every name of the image escaped. Pure."""

from __future__ import annotations

from html import escape
from typing import Any

from imagecache.explain.text import (
    counterfactual_text,
    percent,
    place_text,
    seconds_text,
    verdict,
)
from imagecache.terminal import size_text

_WIDTH, _LEFT, _RIGHT = 1120, 96, 16
_ROW = 5
_MAX_ROWS = 240
_DOTS_HEIGHT = 300
_MAX_DOTS = 2500
_COLOURS = {
    "cold": "#c0392b",
    "rot": "#7d3c98",
    "late": "#d68910",
    "joined": "#b7950b",
    "first-use": "#2e86c1",
    "copy": "#5d6d7e",
}
_PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1c2733;--soft:#66727f;--line:#d5dbe1;--paper:#fff;
--card:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9ee;--soft:#93a0ad;--line:#33404d;
--paper:#12181f;--card:#1a222b}}
body{font:14px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);margin:2rem auto;
max-width:1120px;padding:0 1rem}
"""
FIGURE_STYLE = """
.start h1{font-size:1.25rem;margin:0}.start h2{font-size:1rem;margin:2rem 0 .4rem}
.start p{margin:.3rem 0}
.start .soft{color:var(--soft)}.start .cards{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0}
.start .card{background:var(--card);border-radius:6px;padding:.5rem .9rem;min-width:8rem}
.start .card b{display:block;font-size:1.15rem}
.start .figure{overflow-x:auto}
.start svg{display:block;width:100%;min-width:640px;height:auto;background:var(--card);
border-radius:6px}
.start svg text{font:10px system-ui,sans-serif;fill:var(--soft)}
.start .grid{stroke:var(--line);stroke-width:1}
.start table{border-collapse:collapse;width:100%}
.start td,.start th{text-align:left;padding:.15rem .7rem .15rem 0;
border-bottom:1px solid var(--line);vertical-align:top}.start td.n,.start th.n{text-align:right;
white-space:nowrap}
.start td.f{word-break:break-all;font-family:ui-monospace,monospace;font-size:12px}
.start .key i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 1em}
.start .hit{fill:#229954;background:#229954}.start .miss{fill:#c0392b;background:#c0392b}
.start .ahead{fill:#85c1e9;background:#85c1e9}
""" + "".join(
    f".start .{cause}{{fill:{colour};background:{colour}}}\n" for cause, colour in _COLOURS.items()
)
"""What the page's `main.start` needs, for other pages that show it too."""


def page_html(report: dict[str, Any]) -> str:
    """The whole page."""
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(_title(report))}</title><style>{_PAGE_STYLE}{FIGURE_STYLE}"
        f"</style></head><body>{figures_html(report)}</body></html>\n"
    )


def figures_html(report: dict[str, Any]) -> str:
    """The page's `main.start` alone, without style; FIGURE_STYLE is what it needs."""
    parts = [
        f"<main class=start><h1>{escape(_title(report))}</h1>",
        f"<p class=soft>{escape(_printable(report['reference']))} &middot; "
        f"{escape(report['image'])} &middot; {escape(report['begun'])}</p>",
        f"<p>{escape(verdict(report))}</p><p>{escape(counterfactual_text(report))}</p>",
        _cards(report),
        "<h2>Waits</h2>",
        _key(),
        _waterfall(report),
        "<h2>First reads, by disk offset</h2>",
        _dots(report),
        "<h2>Map of the disk</h2>",
        _map(report),
        "<h2>Waits by file</h2>",
        _files(report),
        "<h2>The longest waits</h2>",
        _stalls(report),
        "</main>",
    ]
    return "".join(parts)


def _title(report: dict[str, Any]) -> str:
    return f"Start of {report['export']}"


def _printable(text: str) -> str:
    # A lone surrogate (a name that is not UTF-8) cannot be encoded into the page.
    return text.encode("utf-8", "backslashreplace").decode()


def _cards(report: dict[str, Any]) -> str:
    ahead, wide, stalls = report["ahead"], report["amplification"], report["stalls"]
    cards = [
        (seconds_text(report["seconds"]), "first read to last"),
        (seconds_text(stalls["wall_seconds"]), f"waiting, in {stalls['count']} reads"),
        (size_text(report["touched_bytes"]), f"read, in {report['touched_chunks']} chunks"),
        (size_text(wide["fetched_bytes"]), f"fetched by the daemon, {wide['gets']} GETs"),
        (percent(ahead["hit_rate"]), f"of it brought ahead ({ahead['source']})"),
        (percent(ahead["waste_rate"]), "of what was brought not read"),
    ]
    inner = "".join(
        f"<div class=card><b>{escape(number)}</b>{escape(text)}</div>" for number, text in cards
    )
    return f"<div class=cards>{inner}</div>"


def _key() -> str:
    items = "".join(f"<i class={cause}></i>{cause}" for cause in _COLOURS)
    return f"<p class='soft key'>{items}</p>"


def _x(seconds: float, total: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * max(0.0, seconds) / total


def _axis(total: float, height: float) -> str:
    parts = []
    for step in range(11):
        at = total * step / 10
        x = _x(at, total)
        parts.append(f"<line class=grid x1={x:.1f} x2={x:.1f} y1=14 y2={height:.0f} />")
        parts.append(f"<text x={x:.1f} y=10 text-anchor=middle>{seconds_text(at)}</text>")
    return "".join(parts)


def _total(report: dict[str, Any]) -> float:
    return max(float(report["seconds"]), 1e-3)


def _waterfall(report: dict[str, Any]) -> str:
    stalls = sorted(report["stalls"]["listed"], key=lambda x: -x["seconds"])[:_MAX_ROWS]
    stalls.sort(key=lambda x: x["at"])
    if not stalls:
        return "<p>No read waited.</p>"
    total = _total(report)
    height = 20 + _ROW * len(stalls)
    bars = []
    for row, stall in enumerate(stalls):
        left, right = _x(stall["at"], total), _x(stall["at"] + stall["seconds"], total)
        tip = (
            f"{seconds_text(stall['at'])}: {seconds_text(stall['seconds'])}, {stall['cause']}, "
            f"{place_text(stall)}"
        )
        bars.append(
            f"<rect x={left:.1f} y={18 + row * _ROW} width={max(1.0, right - left):.1f} "
            f"height={_ROW - 1} class={stall['cause']}>"
            f"<title>{escape(tip)}</title></rect>"
        )
    left_out = report["stalls"]["count"] - len(stalls)
    note = f"<p class=soft>{left_out} shorter waits are not drawn.</p>" if left_out else ""
    return (
        f"<div class=figure><svg viewBox='0 0 {_WIDTH} {height}' role=img aria-label=waits>"
        f"{_axis(total, height)}{''.join(bars)}</svg></div>{note}"
    )


def _dots(report: dict[str, Any]) -> str:
    reads = report["waterfall"]["reads"]
    step = max(1, -(-len(reads) // _MAX_DOTS))
    total, size = _total(report), max(1, report["map"]["size_bytes"])
    height = _DOTS_HEIGHT + 20
    parts = [f"<div class=figure><svg viewBox='0 0 {_WIDTH} {height}' role=img aria-label=reads>"]
    parts.append(_axis(total, height))
    for region in report["map"]["regions"]:
        y = 16 + _DOTS_HEIGHT * region["start"] / size
        parts.append(f"<line class=grid x1={_LEFT} x2={_WIDTH - _RIGHT} y1={y:.1f} y2={y:.1f} />")
        parts.append(f"<text x=4 y={y + 9:.1f}>{escape(region['name'])}</text>")
    for at, offset, _, hit in reads[::step]:
        y = 16 + _DOTS_HEIGHT * offset / size
        kind = "hit" if hit else "miss"
        parts.append(f"<circle class={kind} cx={_x(at, total):.1f} cy={y:.1f} r=1.6 />")
    parts.append("</svg></div><p class='soft key'><i class=hit></i>here")
    parts.append("<i class=miss></i>waited for</p>")
    return "".join(parts)


def _map(report: dict[str, Any]) -> str:
    disk = report["map"]
    columns = 80
    side = (_WIDTH - 8) / columns
    count = -(-disk["size_bytes"] // disk["cell_bytes"])
    rows = -(-count // columns)
    cells = {cell["cell"]: cell for cell in disk["cells"]}
    ahead = set(disk["ahead"])
    parts = [
        f"<div class=figure><svg viewBox='0 0 {_WIDTH} {rows * side + 8:.0f}' role=img "
        "aria-label=map>"
    ]
    for number in range(count):
        cell = cells.get(number)
        if cell is None and number not in ahead:
            continue
        x, y = 4 + number % columns * side, 4 + number // columns * side
        where = f"{size_text(number * disk['cell_bytes'])}"
        if cell is None:
            kind, strength, tip = "ahead", 1.0, f"{where}: brought ahead, not read"
        else:
            kind = "miss" if cell["missed"] * 2 > cell["read"] else "hit"
            strength = 0.35 + 0.65 * min(1.0, cell["read"] / disk["cell_bytes"])
            tip = (
                f"{where}: {size_text(cell['read'])} read, first at {seconds_text(cell['first'])}, "
                f"{size_text(cell['missed'])} waited for"
            )
        parts.append(
            f"<rect class={kind} x={x:.1f} y={y:.1f} width={side - 1:.1f} height={side - 1:.1f} "
            f"opacity={strength:.2f}><title>{escape(tip)}</title></rect>"
        )
    parts.append("</svg></div>")
    parts.append(
        f"<p class='soft key'>One cell is {size_text(disk['cell_bytes'])}."
        "<i class=hit></i>read, was here<i class=miss></i>read, "
        "mostly waited for<i class=ahead></i>brought ahead, not read</p>"
    )
    return "".join(parts)


def _files(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td class=n>{seconds_text(row['seconds'])}<td class=n>{row['count']}"
        f"<td class=f>{escape(_printable(row['path']))}"
        for row in report["stalls"]["by_file"]
    )
    return f"<table><tr><th class=n>Time<th class=n>Waits<th>File{rows}</table>"


def _stalls(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td class=n>{seconds_text(x['at'])}<td class=n>{seconds_text(x['seconds'])}"
        f"<td class=n>{x['offset']}<td class=n>{x['length']}<td>{escape(x['cause'])}"
        f"<td>{escape(x['tier'])}<td class=f>{escape(place_text(x))}"
        f"{'<br>' + escape(x['error']) if x['error'] else ''}"
        for x in report["stalls"]["longest"]
    )
    head = "<th class=n>At<th class=n>Waited<th class=n>Disk offset<th class=n>Bytes<th>Cause"
    return f"<div class=figure><table><tr>{head}<th>From<th>File{rows}</table></div>"
