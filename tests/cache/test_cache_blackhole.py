"""The store answers nobody any more, and the daemon is killed meanwhile: what a host has."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import nbd
import pytest
from imagemaker.entries import Entry, directory
from kits.image import write_image
from kits.journey import Cubecache
from testbed.processes import Stage
from testbed.servers import start_object_store, start_proxy, store_environment

PIECE = 128 << 10
PATIENCE_MS = 90_000


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


def write_files(folder: Path, seed: int) -> str:
    rng = random.Random(seed)
    files = [directory("lib")]
    files += [Entry(f"lib/{n:02}", content=rng.randbytes(700_000)) for n in range(12)]
    return write_image(folder, [files], compression="none")


def connect(uri: str) -> nbd.NBD:
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


def read(client: nbd.NBD, at: int, length: int) -> bytes | None:
    """What a range reads as; None for an error. An answer comes, whichever it is."""
    buffer = nbd.Buffer(length)
    cookie = client.aio_pread(buffer, at)
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while True:
        try:
            if client.aio_command_completed(cookie):
                return bytes(buffer.to_bytearray())
        except nbd.Error:
            return None
        assert time.monotonic() < deadline, "neither bytes nor an error"
        client.poll(1000)


def whole(client: nbd.NBD) -> list[bytes | None]:
    size = client.get_size()
    return [read(client, at, min(PIECE, size - at)) for at in range(0, size, PIECE)]


def span(host: Cubecache, image: str, number: int) -> tuple[int, int]:
    found = host.run("inspect", image, f"/lib/{number:02}", "--json").json()
    return found["offset_bytes"], found["size_bytes"]


def wait_for_fill(host: Cubecache, name: str) -> None:
    for _ in range(200):
        found = {export["name"]: export for export in host.run("exports", "--json").json()}
        if found[name]["fill"]["state"] == "done":
            return
        time.sleep(0.3)
    raise AssertionError(f"{name} is not filled: {found[name]}")


def wait_for_index(host: Cubecache) -> None:
    """The index is written a moment after the chunks: until it says the same for two seconds."""
    counts = [-1]
    for _ in range(60):
        with contextlib.closing(sqlite3.connect(host.state / "arena/index.db", timeout=30)) as db:
            counts.append(db.execute("SELECT count(*) FROM chunks").fetchone()[0])
        if len(set(counts[-3:])) == 1:
            return
        time.sleep(1)
    raise AssertionError(f"the index goes on changing: {counts}")


def black_hole(stage: Stage, tmp_path: Path, rounds: int) -> None:
    store = start_object_store(stage)
    environment = store_environment()
    builder = Cubecache(stage, stage.folder / "builder", store.url(), environment)
    images = [write_files(tmp_path / name, seed) for seed, name in enumerate(("full", "half"))]
    for image in images:
        builder.preload(image)
    spans = [span(builder, images[1], n) for n in range(12)]
    proxy = start_proxy(stage, store.endpoint)
    config = stage.folder / "config.toml"
    config.write_text("[cache]\nstall_seconds = 3.0\n")
    url = store.url(proxy.endpoint)
    host = Cubecache(stage, stage.folder / "host", url, environment, config)
    daemon = host.serve()
    full = daemon.export(images[0], "--name", "full", "--fill", "whole")
    half = daemon.export(images[1], "--name", "half", "--fill", "none")
    wait_for_fill(host, "full")
    client = connect(full)
    truth = whole(client)
    assert None not in truth
    client = connect(half)
    had = {n: read(client, *spans[n]) for n in range(0, 12, 3)}
    assert None not in had.values()
    wait_for_index(host)
    for name in ("full", "half"):  # the images' source is gone as well
        shutil.rmtree(tmp_path / name)
    os.kill(proxy.process.child.pid, signal.SIGSTOP)  # connects, and never answers
    daemon.crash()
    again = host.serve()
    client = connect(full)
    for _ in range(rounds):
        assert whole(client) == truth
    client = connect(half)
    assert {n: read(client, *spans[n]) for n in had} == had
    assert read(client, spans[10][0] + (400 << 10), 4096) is None
    assert {n: read(client, *spans[n]) for n in had} == had  # on the same connection
    os.kill(proxy.process.child.pid, signal.SIGCONT)
    assert None not in whole(client)
    assert again.stop() == 0
    assert "Traceback" not in again.process.log.read_text()


def test_a_filled_image_needs_nobody(stage: Stage, tmp_path: Path) -> None:
    """F30, H2: a filled image reads on, a half-filled one gives what it has, EIO, and recovers."""
    black_hole(stage, tmp_path, rounds=1)


@pytest.mark.soak
def test_a_filled_image_needs_nobody_for_an_hour_s_requests(stage: Stage, tmp_path: Path) -> None:
    """36,000 requests, ten a second for an hour, while nobody answers the daemon."""
    black_hole(stage, tmp_path, rounds=36_000 * PIECE // (80 << 20))
