"""The command under test as a user runs it: state dir, store, environment, daemon."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed.processes import Process, Stage, completed

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / ".venv/bin/cubecache"


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Cubecache:
    """One installation: every call uses its state dir and store."""

    stage: Stage
    state: Path
    store: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    config: Path | None = None

    def command(self, *arguments: str) -> list[str]:
        command = [str(COMMAND), "--state-dir", str(self.state)]
        if self.store:
            command += ["--store", self.store]
        if self.config:
            command += ["--config", str(self.config)]
        return [*command, *arguments]

    def full_environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUBECACHE_", "AWS_"))}
        return kept | self.environment | dict(extra or {})

    def run(
        self,
        *arguments: str,
        expect: int | None = 0,
        seconds: float = 240,
        environment: Mapping[str, str] | None = None,
    ) -> Answer:
        """Runs a command to its end; whatever its end, a traceback fails the test."""
        outcome = completed(self.command(*arguments), seconds, self.full_environment(environment))
        answer = Answer(
            outcome.returncode,
            outcome.stdout.decode(errors="replace"),
            outcome.stderr.decode(errors="replace"),
        )
        assert "Traceback" not in answer.err, answer.err
        if expect is not None:
            assert answer.code == expect, f"{arguments} ended with {answer}"
        return answer

    def names(self) -> list[str]:
        """All names of the realm's images."""
        return [name for image in self.run("images", "--json").json() for name in image["names"]]

    def preload(self, image: str) -> dict[str, Any]:
        (found,) = self.run("preload", image, "--json").lines()
        return dict(found)

    def interrupted(self, *arguments: str, seconds: float) -> Answer:
        """Sends a command SIGINT a while after it opened something of its state dir; its end.

        Before that it is Python that starts, and answers a signal in its own way.
        """
        child = subprocess.Popen(
            self.command(*arguments),
            env=self.full_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while child.poll() is None and not self._is_open_in(child.pid):
                assert time.monotonic() < deadline, f"{arguments} opened nothing"
                time.sleep(0.01)
            time.sleep(seconds)
            os.killpg(child.pid, signal.SIGINT)
            out, err = child.communicate(timeout=60)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            raise
        return Answer(child.returncode, out.decode(), err.decode())

    def _is_open_in(self, pid: int) -> bool:
        try:
            opened = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            return False
        return any(path.startswith(str(self.state)) for path in opened)

    def serve(self, *arguments: str) -> "Daemon":
        """Starts the daemon and returns when its control socket answers."""
        process = self.stage.start(
            self.command("serve", *arguments), environment=self.full_environment()
        )
        socket = self.state / "control.sock"
        process.wait_until(lambda: socket.exists() and self._answers(), 60)
        return Daemon(self, process)

    def _answers(self) -> bool:
        return self.run("exports", "--json", expect=None).code == 0


@dataclass
class Daemon:
    """A running `cubecache serve`."""

    owner: Cubecache
    process: Process

    def export(self, image: str, *arguments: str) -> str:
        """Exports an image and returns its NBD URI."""
        uri = self.owner.run("export", image, *arguments).out.strip()
        assert uri.startswith("nbd+unix:///"), uri
        return uri

    def stop(self) -> int:
        return self.process.stop(30)

    def crash(self) -> None:
        self.process.kill()


def tool(*command: str, expect: int | None = 0, seconds: float = 240) -> Answer:
    """Runs an outside program that must be there."""
    outcome = completed(command, seconds)
    answer = Answer(
        outcome.returncode,
        outcome.stdout.decode(errors="replace"),
        outcome.stderr.decode(errors="replace"),
    )
    if expect is not None:
        assert answer.code == expect, f"{command}: {answer.out}{answer.err}"
    return answer
