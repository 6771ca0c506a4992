"""The demo behind ./tools/demo: registry, store behind a counting proxy, preload, serve, microVM.

Two installations stand for two hosts: one builds the image into the store, the other has never seen
it and starts from it. All that is started here is stopped here, on an error or a signal too.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import nbd  # type: ignore[import-untyped]  # libnbd ships no types
from imagemaker.layout import push
from imagemaker.make import TAG, make
from imagemaker.recipes import RECIPES
from testbed.guestrun import GuestRun, run_guest
from testbed.lazymount import LazyMount
from testbed.processes import Stage, StageError
from testbed.servers import (
    ROOT,
    ObjectStore,
    Proxy,
    start_object_store,
    start_proxy,
    start_registry,
    store_environment,
)

COMMAND = str(ROOT / ".venv/bin/cubecache")
RECIPE = "python-numpy"
PROGRAM = (
    "python3",
    "-c",
    "import numpy; print('numpy', numpy.__version__, 'says', numpy.arange(10).sum())",
)
STAGES = ("resolve", "pull", "flatten", "store", "commit")
CONFIG = "[cache]\nbudget_bytes = '8GiB'\nstall_seconds = 5.0\n"


class DemoError(Exception):
    """A step of the demo failed; the message says which and why."""


@dataclass
class Timeline:
    """What took how long, in the order it happened."""

    rows: list[tuple[str, float | None, str]] = field(default_factory=list)

    def add(self, what: str, seconds: float | None, note: str = "") -> None:
        """Adds a row and shows it as it happens; `seconds` None for a row of facts alone."""
        self.rows.append((what, seconds, note))
        shown = "" if seconds is None else f"{seconds:8.3f} s"
        print(f"  {what:<34}{shown:>12}  {note}", flush=True)


@dataclass(frozen=True)
class Host:
    """One installation of cubecache: a state dir, and the store as this host reaches it."""

    state: Path
    store: str
    config: Path

    def command(self, *arguments: str) -> list[str]:
        """The full command line of a cubecache command on this host."""
        options = ["--config", str(self.config), "--state-dir", str(self.state)]
        return [COMMAND, *options, "--store", self.store, *arguments]

    def call(self, *arguments: str) -> str:
        """Runs a command to its end; its stdout. Raises DemoError with its message."""
        outcome = subprocess.run(
            self.command(*arguments),
            check=False,
            stdout=subprocess.PIPE,
            stderr=None if sys.stderr.isatty() else subprocess.PIPE,
            text=True,
            env=os.environ | store_environment(),
        )
        if outcome.returncode:
            raise DemoError(f"cubecache {arguments[0]} failed: {(outcome.stderr or '').strip()}")
        return outcome.stdout


def say(text: str) -> None:
    """One line that heads a step."""
    print(f"\n{text}", flush=True)


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB"


def local_image(stage: Stage, timeline: Timeline) -> str:
    """Makes the demo's image from packages and pushes it to a registry on loopback."""
    say("1. A real image, from this distribution's packages, in a real registry")
    begin = time.monotonic()
    layout = make(RECIPES[RECIPE], ROOT / ".cache/images")
    timeline.add("make the image (cached)", time.monotonic() - begin, str(layout.name))
    registry = start_registry(stage)
    image = f"{registry.address}/demo/{RECIPE}:v1"
    begin = time.monotonic()
    push(layout, TAG, image)
    timeline.add("push it", time.monotonic() - begin, image)
    return image


def preload(builder: Host, image: str, store: ObjectStore, timeline: Timeline) -> dict[str, Any]:
    """Builds the image into the store; its result."""
    say("2. Preload: pull, flatten, store")
    result: dict[str, Any] = json.loads(builder.call("preload", image, "--json"))
    for name in STAGES:
        timeline.add(name, result["stages"].get(name, 0.0))
    timeline.add(
        "preload, all of it",
        result["seconds"],
        f"{result['chunks']} chunks, disk {size(result['size_bytes'])}, "
        f"{size(store.stored_bytes())} stored",
    )
    return result


def first_start(host: Host, image: str, program: Sequence[str], timeline: Timeline) -> GuestRun:
    """Boots a microVM from the image and shows what its program says."""
    guest = run_guest(host.command("run", "--json", image, *(["--", *program] if program else [])))
    for name, seconds in guest.events:
        timeline.add(name, seconds)
    if guest.events:
        timeline.add("read from the root disk", None, f"{size(guest.read_bytes)} ({guest.note})")
    return guest


def show_fetched(proxy: Proxy, stored: int, timeline: Timeline) -> float:
    """Adds what was fetched so far; the share of the stored bytes."""
    counters = proxy.counters()
    fetched = sum(count["bytes"] for count in counters.values())
    requests = ", ".join(f"{count['requests']} {name}" for name, count in counters.items())
    share = fetched / stored
    note = f"{size(fetched)} of {size(stored)} stored = {share:.1%} (requests: {requests})"
    timeline.add("fetched from the store", None, note)
    return share


def cold_read_is_eio(uri: str, proxy: Proxy, timeline: Timeline) -> bool:
    """Kills the proxy, then reads until something is not here; whether that was EIO."""
    say("5. The store dies: what is here is still served, what is not is an I/O error")
    connection = nbd.NBD()
    connection.connect_uri(uri)
    connection.pread(4096, 0)
    proxy.process.kill()
    begin = time.monotonic()
    connection.pread(4096, 0)
    timeline.add("warm read without a store", time.monotonic() - begin, "right bytes")
    step = 1 << 20
    for offset in range(0, connection.get_size() - step, step):
        begin = time.monotonic()
        try:
            connection.pread(step, offset)
        except nbd.Error as error:
            is_eio = error.errno in ("EIO", errno.EIO)
            timeline.add("cold read without a store", time.monotonic() - begin, error.string)
            return is_eio
    timeline.add("cold read without a store", None, "nothing was cold: all of it is here")
    return False


def demonstrate(image: str | None, program: Sequence[str], stage: Stage) -> int:
    """All steps; the exit code."""
    timeline = Timeline()
    config = stage.folder / "config.toml"
    config.write_text(CONFIG, encoding="utf-8")
    name = image or local_image(stage, timeline)
    store = start_object_store(stage)
    builder = Host(stage.folder / "builder", store.url(), config)
    preload(builder, name, store, timeline)
    stored = store.stored_bytes()
    proxy = start_proxy(stage, store.endpoint)
    host = Host(stage.folder / "host", store.url(proxy.endpoint), config)
    say("3. Another host, which has nothing of it: daemon, export, microVM (fill is off)")
    begin = time.monotonic()
    daemon = stage.start(host.command("serve", "--fill", "none"), os.environ | store_environment())
    daemon.wait_until((host.state / "control.sock").exists, 60)
    timeline.add("daemon", time.monotonic() - begin)
    begin = time.monotonic()
    uri = host.call("export", name).strip()
    timeline.add("export", time.monotonic() - begin, uri)
    chosen = program or (() if image else PROGRAM)
    cold = first_start(host, name, chosen, timeline)
    in_vm = bool(cold.events)
    mount = None
    if not in_vm:
        print(f"  no microVM here: {cold.errors.strip()}\n  the same by a lazy mount instead")
        mount = LazyMount(host.command, stage.folder / "mounted")
        cold = mount.start(name, chosen or PROGRAM, timeline.add)
    share = show_fetched(proxy, stored, timeline)
    say("4. The same start again, warm")
    proxy.reset()
    warm = (
        first_start(host, name, chosen, timeline)
        if mount is None
        else mount.start(name, chosen or PROGRAM, timeline.add)
    )
    show_fetched(proxy, stored, timeline)
    eio = cold_read_is_eio(uri, proxy, timeline)
    return judge(Shown(image is None, in_vm, cold, warm, share, eio))


@dataclass(frozen=True)
class Shown:
    """What the demo saw: `share` is fetched over stored bytes of the cold start."""

    own_image: bool
    in_vm: bool
    cold: GuestRun
    warm: GuestRun
    share: float
    eio: bool

    def missing(self) -> list[str]:
        """What should have been shown and was not; an image of the user's may be tiny or silent."""
        wrong = []
        codes = {self.cold.code, self.warm.code}
        if codes != {0}:
            wrong.append(f"the program ended with {codes}: {self.cold.errors}{self.warm.errors}")
        if self.own_image and not self.cold.output.strip():
            wrong.append("the program printed nothing")
        if self.own_image and self.share >= 0.5:
            wrong.append(f"{self.share:.1%} of the stored bytes were fetched")
        if self.own_image and not self.eio:
            wrong.append("a cold read without a store was not EIO")
        return wrong


def judge(shown: Shown) -> int:
    """Prints what was shown and what was not; 0 when all of it was."""
    wrong = shown.missing()
    say("Summary")
    where = "a microVM" if shown.in_vm else "a lazy mount (this machine boots no microVM)"
    print(f"  The program ran from {where} after fetching {shown.share:.1%} of what is stored.")
    print(f"  {'seconds':<38}{'cold':>10}{'warm':>10}")
    warm = dict(shown.warm.events)
    for name, seconds in shown.cold.events:
        print(f"  {name:<38}{seconds:>10.3f}{warm.get(name, 0.0):>10.3f}")
    print(f"  With the store dead, a cold read {'is EIO' if shown.eio else 'did not happen'}.")
    for line in wrong:
        print(f"  NOT SHOWN: {line}", file=sys.stderr)
    print("  demo: " + ("failed" if wrong else "all of it worked"))
    return 1 if wrong else 0


def _leave(number: int, _frame: FrameType | None) -> None:
    # As an exception, so that every `with` on the way stops what it started.
    raise SystemExit(128 + number)


def main() -> int:
    """Parses the arguments and shows the demo."""
    arguments = sys.argv[1:]
    program: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, program = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(prog="demo", usage="demo [IMAGE [-- CMD ARG...]]")
    parser.add_argument("image", nargs="?")
    chosen = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave)
    with Stage() as stage:
        # What a child leaves behind goes with the stage.
        os.environ["TMPDIR"] = str(stage.folder)
        try:
            return demonstrate(chosen.image, program, stage)
        except (DemoError, StageError, subprocess.CalledProcessError) as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
