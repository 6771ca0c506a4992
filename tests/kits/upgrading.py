"""A real `cubecache serve` that is upgraded, killed and started again, and clients that notice."""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbd

COMMAND = Path(__file__).parents[2] / ".venv/bin/cubecache"
SECONDS = 120.0
BLOCK = 4096


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class ServedHost:
    """One state directory and the daemon that serves it now, whoever started it."""

    def __init__(self, state: Path, program: Path = COMMAND) -> None:
        self.state = state
        self.program = program
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUBECACHE_", "LISTEN_"))}
        self.environment: dict[str, str] = kept | {"CUBECACHE_STATE_DIR": str(state)}
        self.log = state.parent / f"{state.name}.log"
        self.pid = 0
        self.children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "ServedHost":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid and alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)
        for child in self.children:
            child.kill()
            child.wait(SECONDS)

    def cubecache(self, *arguments: str) -> str:
        """The stdout of a command that has to do it."""
        outcome = self.outcome(*arguments)
        assert outcome.returncode == 0, (arguments, outcome, self.log.read_text()[-3000:])
        return outcome.stdout.strip()

    def outcome(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, *arguments],
            capture_output=True,
            text=True,
            env=self.environment,
            check=False,
            timeout=SECONDS,
            stdin=subprocess.DEVNULL,
        )

    def start(
        self, *, extra: Mapping[str, str] | None = None, pass_fds: tuple[int, ...] = (), **rest: Any
    ) -> subprocess.Popen[bytes]:
        """Starts a daemon without waiting for it."""
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [self.program, "serve"],
                env=self.environment | dict(extra or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
                **rest,
            )
        self.children.append(child)
        self.pid = child.pid
        return child

    def serve(self) -> subprocess.Popen[bytes]:
        """Starts a daemon, and waits until it answers."""
        child = self.start()
        self.wait_ready()
        return child

    def wait_ready(self) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.answers():
            assert alive(self.pid), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def answers(self) -> bool:
        try:
            return self.call("GET", "/readyz")["status"] == "ready"
        except OSError:
            return False

    def call(self, method: str, path: str, body: Any = None, *, refused: int = 0) -> Any:
        """What the control API answers; the status has to be good, or the one of a refusal."""
        connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(SECONDS)
        try:
            connection.sock.connect(str(self.state / "control.sock"))
            raw = None if body is None else json.dumps(body)
            connection.request(method, path, raw, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        good = answer.status == refused if refused else answer.status < 400
        assert good, (answer.status, text, self.log.read_text()[-3000:])
        return json.loads(text) if text else None

    def export(self, image: str, **rest: Any) -> str:
        """Exports a preloaded image; its URI."""
        return str(self.call("POST", "/v1/exports", {"image": image, **rest})["uri"])

    def upgrade(self) -> int:
        """Upgrades, and waits for the old process's end; the new pid."""
        old = self.pid
        pid = int(self.call("POST", "/v1/upgrade")["pid"])
        deadline = time.monotonic() + SECONDS
        while alive(old):
            assert time.monotonic() < deadline, self.log.read_text()
            for child in self.children:
                child.poll()
            time.sleep(0.01)
        self.pid = pid
        return pid

    def kill(self) -> None:
        """Kills the daemon; whether anybody waits for it then is as it may be."""
        os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while alive(self.pid):
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + SECONDS
        while alive(self.pid):
            assert time.monotonic() < deadline, self.log.read_text()
            for child in self.children:
                child.poll()
            time.sleep(0.01)


class Reader(threading.Thread):
    """Verified reads, and where it may, writes, by one libnbd connection, until told to stop."""

    def __init__(self, uri: str, model: bytearray, seed: int, *, writes: bool, lanes: int = 4):
        super().__init__(name=f"reader {seed}")
        self.uri, self.model, self.seed, self.writes = uri, model, seed, writes
        self.lanes = lanes
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.done = 0
        self.worst = 0.0

    def run(self) -> None:
        try:
            self._work()
        except BaseException as failure:
            self.failures.append(failure)

    def _work(self) -> None:
        rng = random.Random(self.seed)
        client = nbd.NBD()
        client.connect_uri(self.uri)
        blocks = range(self.seed % self.lanes, len(self.model) // BLOCK, self.lanes)
        while not self.stop.is_set():
            offset = rng.choice(blocks) * BLOCK
            began = time.monotonic()
            if self.writes and rng.random() < 0.4:
                body = rng.randbytes(BLOCK)
                client.pwrite(body, offset)
                self.model[offset : offset + BLOCK] = body
            else:
                found = bytes(client.pread(BLOCK, offset))
                assert found == self.model[offset : offset + BLOCK], f"wrong bytes at {offset}"
            self.worst = max(self.worst, time.monotonic() - began)
            self.done += 1
            time.sleep(0.001)  # the daemons need the processors too
        client.shutdown()


class Readers:
    """Some readers, started on entering; on leaving they have stopped, and none has failed."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers = readers

    def __enter__(self) -> "Readers":
        for reader in self.readers:
            reader.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for reader in self.readers:
            reader.stop.set()
        for reader in self.readers:
            reader.join(SECONDS)
        if kind is None:
            assert [x.failures for x in self.readers] == [[]] * len(self.readers)
            assert not any(reader.is_alive() for reader in self.readers)

    def pause(self) -> float:
        """The longest that any request took since the last call, in seconds."""
        worst = max(reader.worst for reader in self.readers)
        for reader in self.readers:
            reader.worst = 0.0
        return worst
