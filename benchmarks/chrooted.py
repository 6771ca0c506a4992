"""A program in a chroot over a tree that it may not write: an overlay in memory above it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from startloads import Load, says_ready, settings_of

LONGEST_SECONDS = 180.0


@contextlib.contextmanager
def writable(root: Path, folder: Path) -> Iterator[Path]:
    """A root over which a program may write, in memory, with /proc and /dev."""
    for name in ("upper", "merged"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder / "upper")], check=True)
    merged = folder / "merged"
    mounted = [folder / "upper"]
    try:
        (folder / "upper/u").mkdir()
        (folder / "upper/w").mkdir()
        options = f"lowerdir={root},upperdir={folder}/upper/u,workdir={folder}/upper/w"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "none", str(merged)], check=True)
        mounted.append(merged)
        for kind, name in (("proc", "proc"), ("devtmpfs", "dev"), ("tmpfs", "tmp")):
            (merged / name).mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", kind, "none", str(merged / name)], check=True)
            mounted.append(merged / name)
        yield merged
    finally:
        for path in reversed(mounted):
            unmount(path)


def unmount(path: Path) -> None:
    """Unmounts for good: a lazy one would leave a loop device that the next mount finds."""
    for _ in range(100):
        if not subprocess.run(["umount", str(path)], check=False, capture_output=True).returncode:
            return
        time.sleep(0.05)
    raise SystemExit(f"startup: {path} is busy")


def run_program(root: Path, load: Load) -> float:
    """Runs the program in a chroot with a network of its own; the moment it said it is ready."""
    inside = ["env", "-i", *settings_of(load.image).environment, "chroot", str(root), *load.command]
    command = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *inside]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    said = b""
    try:
        assert child.stdout is not None
        deadline = time.monotonic() + LONGEST_SECONDS
        for line in child.stdout:
            said += line
            if says_ready(load, line):
                return time.monotonic()
            if time.monotonic() > deadline:
                break
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            child.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    raise SystemExit(f"startup: {load.image} was never ready:\n{said.decode()[-2000:]}")


def mount_and_run(folder: Path, load: Load, uri: str) -> None:
    """The program over an export that exists already."""
    (folder / "fuse").mkdir(parents=True)
    (folder / "root").mkdir()
    disk = folder / "fuse/disk"
    fuse = subprocess.Popen(["nbdfuse", "-r", str(disk), uri])
    try:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not disk.exists():
            if fuse.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("startup: nbdfuse did not start")
            time.sleep(0.02)
        mount = ["mount", "-t", "erofs", "-o", "ro,loop", str(disk), str(folder / "root")]
        subprocess.run(mount, check=True)
        try:
            with writable(folder / "root", folder / "over") as root:
                run_program(root, load)
        finally:
            unmount(folder / "root")
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(folder / "fuse")], check=False)
        fuse.wait()
