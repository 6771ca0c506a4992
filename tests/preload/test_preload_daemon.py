"""Jobs through the command, a real daemon, and kills."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from imagemaker.entries import Entry
from kits.image import write_image

COMMAND = Path(__file__).parents[2] / ".venv/bin/cubecache"


class Host:
    """One state directory, and commands on it."""

    def __init__(self, state: Path) -> None:
        self.state = state
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CUBECACHE_")}
        self.environment = kept | {"CUBECACHE_STATE_DIR": str(state)}

    def run(self, *arguments: str, expect: int = 0) -> list[Any]:
        outcome = subprocess.run(
            [COMMAND, *arguments, "--json"],
            capture_output=True,
            text=True,
            env=self.environment,
            check=False,
            timeout=120,
        )
        assert outcome.returncode == expect, outcome
        assert "Traceback" not in outcome.stderr
        return [json.loads(line) for line in outcome.stdout.splitlines()]

    @contextlib.contextmanager
    def daemon(self) -> Iterator[subprocess.Popen[bytes]]:
        with (self.state.parent / "log").open("ab") as log:
            process = subprocess.Popen(
                [COMMAND, "serve"], env=self.environment, stdout=log, stderr=log
            )
        try:
            while not self._answers():
                assert process.poll() is None, (self.state.parent / "log").read_text()
                time.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(30)

    def _answers(self) -> bool:
        return (
            subprocess.run(
                [COMMAND, "jobs", "--json"], env=self.environment, capture_output=True, check=False
            ).returncode
            == 0
        )


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "state")


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    layers = [[Entry(f"f{n}", content=os.urandom(1 << 20))] for n in range(3)]
    return [write_image(tmp_path / f"i{n}", layers[: n + 1]) for n in range(3)]


def test_dry_run_detach_jobs_and_pins(host: Host, images: list[str]) -> None:
    """Many images in one call; what is planned is what is then missing; pins are set."""
    (before,) = host.run("preload", "--dry-run", images[2])
    assert (before["present"], before["missing_layers"]) == (False, 3)
    assert before["download_bytes"] == before["total_bytes"] > 3 << 20
    with host.daemon():
        queued = host.run("preload", "--detach", "--pin", "1h", *images)
        assert [job["image"] for job in queued] == images
        done = host.run("preload", *images)
        assert [result["name"] for result in done] == images
        (listed,) = host.run("jobs")
        assert {job["state"] for job in listed} == {"done"}
        (after,) = host.run("preload", "--dry-run", images[2])
        assert (after["present"], after["download_bytes"]) == (True, 0)
        (error,) = host.run("jobs", "pause", queued[0]["id"][:8], expect=75)
        assert error["error"]["kind"] == "Busy"
        host.run("jobs", "cancel", "nothing", expect=66)
    assert len(list((host.state / "store").rglob("*pins*/*"))) == 3
    host.run("jobs", expect=69)


def test_killed_daemons_jobs_end_the_same(host: Host, images: list[str], tmp_path: Path) -> None:
    """I8, I9: the submitter is gone, the daemon is killed, and again; all jobs end, none twice."""
    alone = Host(tmp_path / "alone")
    (wanted,) = alone.run("preload", images[2])
    with host.daemon() as process:
        host.run("preload", "--detach", *images)
        process.kill()
    with host.daemon() as process:
        process.kill()
    with host.daemon():
        deadline = time.monotonic() + 60
        while True:
            (listed,) = host.run("jobs")
            if all(job["state"] == "done" for job in listed):
                break
            assert not any(job["state"] in ("failed", "cancelled") for job in listed), listed
            assert time.monotonic() < deadline, listed
        assert len(listed) == 3
        assert listed[2]["result"]["block_image"] == wanted["block_image"]
