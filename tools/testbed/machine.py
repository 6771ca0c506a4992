"""Where and on what a result was measured: a number without these is worth nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def machine() -> str:
    """One line on this host: processor, cores, memory, kernel, Python."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def commit() -> str:
    """The commit of this checkout, marked `-dirty` when the work tree differs from it.

    The page of soak results is no part of what is judged: it changes with each run.
    """

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(ROOT), *command], check=False, capture_output=True, text=True
        )

    described = git("rev-parse", "--short=12", "HEAD")
    if described.returncode:
        return "unknown"
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!tests/SOAK.md").returncode
    return described.stdout.strip() + ("-dirty" if changed else "")


def version(*command: str) -> str:
    """The first line that a program prints of its own version."""
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return (answer.stdout or answer.stderr).splitlines()[0].strip()
