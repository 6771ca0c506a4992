"""The start of a program from `cubecache mount`, for hosts that boot no microVM."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from testbed.guestrun import GuestRun, run_program
from testbed.servers import store_environment


class LazyMount:
    """Mounts an image, runs a program with it as its root, and unmounts it again."""

    def __init__(self, command: Callable[..., list[str]], folder: Path) -> None:
        self._command = command
        self._folder = folder

    def start(
        self, image: str, program: Sequence[str], add: Callable[[str, float], None]
    ) -> GuestRun:
        """One start: mount, program, umount; `add` is told how long the mount took."""
        self._folder.mkdir(exist_ok=True)
        environment = os.environ | store_environment()
        begin = time.monotonic()
        mount = self._command("mount", image, str(self._folder))
        outcome = subprocess.run(
            mount, check=False, capture_output=True, text=True, env=environment
        )
        mounted = time.monotonic() - begin
        if outcome.returncode:
            return GuestRun(outcome.returncode, "", outcome.stderr, mounted, ())
        try:
            add("lazy mount", mounted)
            found = run_program(["chroot", str(self._folder), *program])
            for name, seconds in found.events:
                add(name, seconds)
            return found
        finally:
            umount = self._command("umount", str(self._folder))
            subprocess.run(umount, check=False, capture_output=True, env=environment)
