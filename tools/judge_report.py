"""Reads pytest's JUnit report: fails on skipped tests, and writes the page of a soak run."""

from __future__ import annotations

import argparse
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from testbed.machine import commit, machine


@dataclass(frozen=True)
class Outcome:
    """One test's end: `passed`, `failed` or `skipped`, with pytest's reason where there is one."""

    name: str
    result: str
    seconds: float
    reason: str


def read_report(path: Path) -> list[Outcome]:
    """The outcomes in the report that our own pytest has just written."""
    outcomes = []
    for case in ET.parse(path).iter("testcase"):
        result, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                result, reason = "failed", child.get("message", "")
            elif child.tag == "skipped":
                result, reason = "skipped", child.get("message", "")
        name = f"{case.get('classname', '')}.{case.get('name', '')}".lstrip(".")
        outcomes.append(Outcome(name, result, float(case.get("time", "0")), reason))
    return outcomes


def soak_rows(page: str) -> dict[str, str]:
    """The rows of a soak page by test."""
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    return {row.split("`")[1]: row for row in rows}


def soak_page(outcomes: list[Outcome], when: str, before: Mapping[str, str]) -> str:
    """The Markdown page of a soak run; `before` are the rows of tests that this run left out."""
    where = f"{when}, {commit()}"
    rows = dict(before)
    for o in outcomes:
        rows[o.name] = f"| `{o.name}` | {o.result} | {o.seconds:.1f} | {where} |"
    lines = [
        "# Soak run",
        "",
        "The big counts of the catalogue's rows, the last result of each. `./tools/test --soak`",
        "writes all rows anew; with chosen tests (`./tools/test --soak tests/store`) only theirs.",
        "",
        f"Machine of the last run: {machine()}.",
        "",
        "| test | result | seconds | date, commit |",
        "| --- | --- | --- | --- |",
        *(rows[name] for name in sorted(rows)),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints what was skipped and returns 1 when anything was, or when no test ran."""
    parser = argparse.ArgumentParser(description="Judge a JUnit report of pytest.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--write", type=Path, help="write the soak page here")
    parser.add_argument("--part", action="store_true", help="keep the page's other rows")
    chosen = parser.parse_args()
    if not chosen.report.exists():
        print("test: pytest wrote no report", file=sys.stderr)
        return 1
    outcomes = read_report(chosen.report)
    if chosen.write:
        when = subprocess.run(
            ["date", "--utc", "+%Y-%m-%d"], check=True, capture_output=True, text=True
        )
        kept = chosen.part and chosen.write.exists()
        before = soak_rows(chosen.write.read_text(encoding="utf-8")) if kept else {}
        page = soak_page(outcomes, when.stdout.strip(), before)
        chosen.write.write_text(page, encoding="utf-8")
    skipped = [outcome for outcome in outcomes if outcome.result == "skipped"]
    for outcome in skipped:
        print(f"test: skipped: {outcome.name}: {outcome.reason}", file=sys.stderr)
    if not outcomes:
        print("test: no test ran", file=sys.stderr)
    return 1 if skipped or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
