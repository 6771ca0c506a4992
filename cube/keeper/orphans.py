"""What looks like ours and belongs to no recorded pod: reported, never removed. Blocking."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

_EXPORT = re.compile(r"pod-([0-9a-f]{12})-\d+")
_COMMAND_LIMIT: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Orphan:
    """One leftover: a machine by its process, a directory, or an export by its name."""

    kind: Literal["machine", "directory", "export"]
    name: str
    pod: str


def find_orphans(
    pods: Path, known: frozenset[str], processes: frozenset[int], exports: Iterable[str]
) -> list[Orphan]:
    """Compares the host with the known pods' uids and machines."""
    found = [
        Orphan("machine", str(pid), uid) for pid, uid in machines(pods) if pid not in processes
    ]
    if pods.is_dir():
        found += [
            Orphan("directory", str(path), path.name)
            for path in sorted(pods.iterdir())
            if path.is_dir() and path.name not in known
        ]
    for name in exports:
        match = _EXPORT.fullmatch(name)
        if match is not None and match[1] not in known:
            found.append(Orphan("export", name, match[1]))
    return found


def machines(pods: Path) -> list[tuple[int, str]]:
    """Processes that are machines of pods below this directory: (process, uid)."""
    mark = re.compile(re.escape(str(pods).encode()) + rb"/([0-9a-f]{12})/config\.img")
    found: list[tuple[int, str]] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            program = (entry / "comm").read_bytes().strip()
            if program.startswith(b"firecracker"):
                place = (entry / "cwd").readlink()  # without a jail, its machine's directory
                if place.parent == pods:
                    found.append((int(entry.name), place.name))
            if program != b"cubecache-vm":
                continue
            with (entry / "cmdline").open("rb") as file:
                match = mark.search(file.read(_COMMAND_LIMIT))
        except OSError:
            continue  # it has ended
        if match is not None:
            found.append((int(entry.name), match[1].decode()))
    return sorted(found)
