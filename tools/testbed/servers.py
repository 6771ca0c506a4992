"""The servers themselves: docker-registry, `rclone serve s3`, the counting proxy."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from testbed.processes import Process, Stage, accepts, free_port

ROOT = Path(__file__).resolve().parents[2]
ACCESS_KEY, SECRET_KEY, BUCKET = "cubecache", "cubecache-secret", "centre"


@dataclass(frozen=True)
class Registry:
    """A docker-registry that keeps its blobs in the stage's folder."""

    address: str
    process: Process


@dataclass(frozen=True)
class ObjectStore:
    """An S3 store with one bucket; `folder` is where its objects lie as files."""

    endpoint: str
    folder: Path
    process: Process

    def url(self, endpoint: str | None = None) -> str:
        """The store URL of its bucket, through `endpoint` (a proxy's) where one is given."""
        return f"s3://{BUCKET}/images?endpoint={quote(endpoint or self.endpoint)}&region=us-east-1"

    def stored_bytes(self) -> int:
        """The size of all its objects."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Proxy:
    """A counting proxy: `endpoint` to go through, `stats` to ask."""

    endpoint: str
    stats: str
    process: Process

    def counters(self) -> dict[str, dict[str, int]]:
        """Requests, bytes and errors of `ranges`, `objects` and `control`."""
        return _ask(self.stats, "GET")

    def reset(self) -> dict[str, dict[str, int]]:
        """Sets the counters to zero and returns what they were."""
        return _ask(f"{self.stats}/reset", "POST")

    def fetched_bytes(self) -> int:
        """All bytes of bodies that went through towards the client."""
        return sum(count["bytes"] for count in self.counters().values())


def store_environment() -> dict[str, str]:
    """The environment that gives clients the object store's credentials."""
    return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


def start_registry(stage: Stage) -> Registry:
    """Starts an empty registry on a free loopback port."""
    port = free_port()
    folder = stage.folder / f"registry-{port}"
    folder.mkdir()
    settings = folder / "config.yml"
    settings.write_text(
        "version: 0.1\n"
        "log: {level: warn}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder / 'blobs'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n",
        encoding="utf-8",
    )
    process = stage.start(["docker-registry", "serve", str(settings)])
    process.wait_until(lambda: accepts(port))
    return Registry(f"127.0.0.1:{port}", process)


def start_object_store(stage: Stage, *options: str) -> ObjectStore:
    """Starts an S3 store with one empty bucket on a free loopback port; `options` are rclone's."""
    port = free_port()
    folder = stage.folder / f"objects-{port}"
    (folder / BUCKET).mkdir(parents=True)
    command = [str(ROOT / ".venv/bin/rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", os.devnull]
    command += ["--vfs-cache-mode", "off", *options, str(folder)]
    process = stage.start(command)
    process.wait_until(lambda: accepts(port))
    return ObjectStore(f"http://127.0.0.1:{port}", folder, process)


def start_proxy(
    stage: Stage, upstream: str, *, first_byte_ms: float = 0, bytes_per_second: float = 0
) -> Proxy:
    """Starts a counting proxy before `upstream` (`http://HOST:PORT`)."""
    command = [str(ROOT / ".venv/bin/python"), str(ROOT / "tools/counting_proxy.py")]
    command += ["--upstream", upstream, "--first-byte-ms", str(first_byte_ms)]
    command += ["--bytes-per-second", str(int(bytes_per_second))]
    process = stage.start(command)
    process.wait_until(lambda: process.log.read_bytes().endswith(b"}\n"))
    addresses = json.loads(process.log.read_bytes().splitlines()[-1])
    return Proxy(addresses["proxy"], addresses["stats"], process)


def _ask(url: str, method: str) -> dict[str, dict[str, int]]:
    request = urllib.request.Request(url, method=method)  # loopback only, from the proxy's own line
    # An environment's HTTP proxy has no business with loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.closing(opener.open(request, timeout=10)) as answer:
        decoded: Any = json.load(answer)
    return {name: dict(count) for name, count in decoded.items()}
