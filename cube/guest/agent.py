"""Compiles the guest agent from the source beside this package, once per source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from imagecache.errors import Unavailable, Unsupported

SOURCE: Final = Path(__file__).resolve().parents[1] / "agent"


def source_digest() -> str:
    """A digest of the agent's source, which names its build."""
    summary = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        if path.suffix in (".c", ".h") or path.name == "Makefile":
            summary.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return summary.hexdigest()[:16]


def build(cache: Path) -> Path:
    """The directory with `cube-agent` and `tsc-khz`; raises Unsupported without a compiler."""
    target = cache / f"agent-{source_digest()}"
    if (target / "cube-agent").is_file() and (target / "tsc-khz").is_file():
        return target
    missing = [tool for tool in ("make", "gcc") if shutil.which(tool) is None]
    if missing:
        raise Unsupported(
            f"the guest agent cannot be compiled: no {' and no '.join(missing)}",
            remedy="apt-get install gcc make libc6-dev",
        )
    fresh = cache / f"agent-{source_digest()}.{os.getpid()}"
    try:
        result = subprocess.run(
            ["make", "--silent", "-C", str(SOURCE), f"OUT={fresh}", "all"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if "rror" in line]
            raise Unavailable(
                f"the guest agent did not compile: {lines[0] if lines else result.stderr[-200:]}",
                remedy="apt-get install gcc make libc6-dev",
            )
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target
