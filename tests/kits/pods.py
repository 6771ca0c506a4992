"""A state directory with pods: the image they run, the commands, and what must not be left."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagemaker.layout import Settings
from kits.image import write_tars
from kits.vm_image import make_tree

CUBECACHE = Path(sys.executable).with_name("cubecache")
APPLETS = ("httpd", "nc", "wget", "find", "tar", "df", "rm", "stty", "tty")


def make_image(directory: Path) -> str:
    """An image of busybox; its reference."""
    tree = make_tree(directory / "tree")
    for applet in APPLETS:
        path = tree / "bin" / applet
        if not path.exists():
            path.symlink_to("busybox")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(tree, arcname=".")
    settings = Settings(command=("sh", "-c", "echo image's own"))
    return write_tars(directory / "layout", [packed.getvalue()], settings)


def until(what: str, check: Callable[[], Any], seconds: float = 120) -> Any:
    """What the check gives once it is true; AssertionError after the time."""
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class PodHost:
    """Commands over one state directory. Daemon and keeper are started by the commands."""

    state: Path
    image: str

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "CUBECACHE_STATE_DIR": str(self.state)}

    def call(self, *words: str, expect: int | None = 0, **more: Any) -> str:
        """stdout of a `cubecache pod` command."""
        done = subprocess.run(
            [str(CUBECACHE), "pod", *words],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=300,
            **more,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert expect is None or done.returncode == expect, (done.returncode, done.stderr)
        return done.stdout

    def works(self, *words: str) -> bool:
        """Whether a `cubecache pod` command succeeds now."""
        command = [str(CUBECACHE), "pod", *words]
        done = subprocess.run(command, capture_output=True, env=self.environment, timeout=300)
        return done.returncode == 0

    def json(self, *words: str, expect: int | None = 0) -> Any:
        return json.loads(self.call(*words, "--json", expect=expect))

    def manifest(self, name: str, text: str) -> str:
        """Writes a manifest, IMAGE in it replaced; its path."""
        path = self.state.parent / f"{name}.yaml"
        path.write_text(text.replace("IMAGE", f'"{self.image}"'))
        return str(path)

    def state_of(self, name: str) -> dict[str, Any]:
        return self.json("get", name)

    def processes(self, mark: str = "") -> list[int]:
        """Processes whose command line names this state directory, and the mark."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if os.fsencode(self.state) in words and mark.encode() in words:
                    found.append(int(entry.name))
        return sorted(found)

    def kill(self, mark: str, number: int = signal.SIGKILL) -> None:
        """Signals them, and waits until these are gone; the keeper may start others."""
        ended = self.processes(mark)
        for pid in ended:
            os.kill(pid, number)
        until(f"{mark} to end", lambda: not set(ended) & set(self.processes(mark)), 60)

    def close(self) -> None:
        """Ends what the commands have left running."""
        for mark in ("cube.keeper", "cubecache-vm", "\0serve"):
            self.kill(mark)
