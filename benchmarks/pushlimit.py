"""The limit of a workload: its bytes through a unix socket by the smallest loop (pushlimit.c)."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PushLimit:
    """The compiled loop, and the file and the part of it (bytes) whose blocks it pushes."""

    program: Path
    file: Path
    offset: int
    length: int

    @classmethod
    def build(cls, folder: Path, file: Path, offset: int, length: int) -> PushLimit:
        """Compiles the loop into `folder`. Raises CalledProcessError, OSError."""
        program = folder / "pushlimit"
        source = Path(__file__).with_suffix(".c")
        compiler = ["gcc", "-O2", "-Wall", "-Werror", "-o", str(program), str(source)]
        subprocess.run(compiler, check=True, timeout=120)
        return cls(program, file, offset, length)

    def replies_per_second(
        self, block: int, depth: int, connections: int, seconds: int, *, random: bool
    ) -> float:
        """One run: blocks of `block` bytes, `depth` in flight on each connection."""
        numbers = (self.offset, self.length, block, depth, connections, seconds)
        command = [str(self.program), str(self.file), *map(str, numbers)]
        command.append("random" if random else "sequential")
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=seconds + 60
        )
        return float(done.stdout)
