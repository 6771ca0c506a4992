"""S3 servers that nobody here wrote, on loopback: rclone (over a directory) and moto."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "cubecachetest", "cubecachesecret"
BUCKET = "bucket"


@dataclass(frozen=True)
class S3Server:
    """A running server with one bucket; `directory` is where its objects lie, if it has one."""

    endpoint: str
    directory: Path | None

    def url(self, prefix: str = "", endpoint: str | None = None) -> str:
        """The store URL of a prefix, through another endpoint (a proxy) if given."""
        return f"s3://{BUCKET}/{prefix}?endpoint={endpoint or self.endpoint}&region=us-east-1"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def scratch_root() -> Iterator[Path]:
    """A directory in memory where there is one: servers under test should not wait for disks."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None, prefix="s3-") as name:
        yield Path(name)


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server process, from the time it listens."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
        try:
            for _ in range(600):
                with socket.socket() as sock:
                    if sock.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            else:
                raise AssertionError(f"{command[0]} does not listen: {log.read_text()}")
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)


@contextmanager
def rclone_server(root: Path) -> Iterator[S3Server]:
    """`rclone serve s3` with SigV4 keys; what is written behind its back shows at once.

    Its directory cache lasts 1 ms: with 0 it spins.
    """
    directory = root / "objects"
    (directory / BUCKET).mkdir(parents=True)
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "rclone"), "serve", "s3", str(directory),
        "--config", str(root / "none.conf"), "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--dir-cache-time", "1ms",
        "--cache-dir", str(root / "cache"),
    ]  # fmt: skip
    with running(command, port, root / "rclone.log"):
        yield S3Server(f"http://127.0.0.1:{port}", directory / BUCKET)


@contextmanager
def moto_server(root: Path) -> Iterator[S3Server]:
    """moto's S3 in a process of its own."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with running(command, port, root / "moto.log"):
        server = S3Server(f"http://127.0.0.1:{port}", None)
        plain_client(server).create_bucket(Bucket=BUCKET)
        yield server


def plain_client(server: S3Server):
    """A boto3 client with nothing of ours in it."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session(
        aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY
    ).client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
