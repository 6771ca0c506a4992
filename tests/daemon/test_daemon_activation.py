"""Sockets of a service manager: passed in, kept in its descriptor store, left where they are."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbd
import pytest
from imagemaker.entries import Entry
from kits.image import write_image
from kits.upgrading import COMMAND, SECONDS, ServedHost, alive

LAUNCHER = (
    'import os,sys; os.environ["LISTEN_PID"]=str(os.getpid()); os.execv(sys.argv[1],sys.argv[1:])'
)


@pytest.fixture
def image(tmp_path: Path) -> str:
    layers = [[Entry("f", content=random.Random(1).randbytes(1 << 20))]]
    return write_image(tmp_path / "image", layers)


def test_systemd_socket_activate_starts_it_at_the_first_client(tmp_path: Path, image: str) -> None:
    """Both sockets are the manager's: a client that came first is answered, and they stay."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    with ServedHost(state) as host:
        host.cubecache("preload", image)
        shutil.rmtree(state / "arena", ignore_errors=True)
        with host.log.open("ab") as log:
            manager = subprocess.Popen(
                [
                    "systemd-socket-activate",
                    *("-l", str(state / "control.sock"), "-l", str(state / "nbd.sock")),
                    *("-E", f"CUBECACHE_STATE_DIR={state}", "-E", f"PATH={os.environ['PATH']}"),
                    *(str(COMMAND), "serve"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        host.pid = manager.pid
        try:
            deadline = time.monotonic() + SECONDS
            while not (state / "nbd.sock").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            inodes = {name: (state / name).stat().st_ino for name in ("control.sock", "nbd.sock")}
            uri = host.export(image)  # waits in the socket's queue while the daemon starts
            client = nbd.NBD()
            client.connect_uri(uri)
            assert client.get_size() > 1 << 20
            client.shutdown()
            host.stop()
            manager.wait(SECONDS)
            assert inodes == {name: (state / name).stat().st_ino for name in inodes}
        finally:
            manager.kill()
            manager.wait(SECONDS)


class Manager(threading.Thread):
    """A service manager with a descriptor store, as systemd's."""

    def __init__(self) -> None:
        super().__init__()
        self.address = f"@cubecache-store-{os.getpid()}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + self.address[1:])
        self._socket.settimeout(0.1)
        self._ending = threading.Event()
        self.stored: dict[str, int] = {}
        self.start()

    def run(self) -> None:
        while not self._ending.is_set():
            try:
                raw, fds, _, _ = socket.recv_fds(self._socket, 4096, 16)
            except TimeoutError:
                continue
            told = dict(line.partition("=")[::2] for line in raw.decode().splitlines())
            if "FDSTORE" in told:
                (self.stored[told["FDNAME"]],) = fds
            elif "FDSTOREREMOVE" in told:
                os.close(self.stored.pop(told["FDNAME"]))

    def close(self) -> None:
        self._ending.set()
        self.join(SECONDS)
        self._socket.close()
        for fd in self.stored.values():
            os.close(fd)

    def restart(self, host: ServedHost) -> None:
        """Starts the daemon again with what is stored, as systemd does."""
        names = list(self.stored)
        base = 200
        for number, name in enumerate(names):
            os.dup2(self.stored[name], base + number)
        moves = "".join(f"os.dup2({base + n},{3 + n});" for n in range(len(names)))
        with host.log.open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-c", f"import os;{moves}{LAUNCHER}", str(COMMAND), "serve"],
                env=host.environment
                | {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)},
                pass_fds=[base + n for n in range(len(names))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for number in range(len(names)):
            os.close(base + number)
        host.children.append(child)
        host.pid = child.pid


def test_killed_daemon_gets_its_sockets_back(tmp_path: Path, image: str) -> None:
    """A client that comes while nobody serves waits in the stored socket's queue."""
    manager = Manager()
    try:
        with ServedHost(tmp_path / "state") as host:
            host.environment["NOTIFY_SOCKET"] = manager.address
            host.serve()
            host.cubecache("preload", image)
            own = tmp_path / "own.sock"
            uris = [host.export(image), host.export(image, socket=str(own))]
            gone = host.export(image, socket=str(tmp_path / "gone.sock"))
            host.call("DELETE", "/v1/exports/" + gone.split("/")[3].partition("?")[0])
            host.kill()
            deadline = time.monotonic() + SECONDS
            while len(manager.stored) != 3:
                assert time.monotonic() < deadline, manager.stored
                time.sleep(0.01)
            failures: list[BaseException] = []

            def come(uri: str) -> None:
                try:
                    client = nbd.NBD()
                    client.connect_uri(uri)
                    client.pread(4096, 0)
                    client.shutdown()
                except BaseException as failure:
                    failures.append(failure)

            clients = [threading.Thread(target=come, args=(uri,)) for uri in uris]
            for client in clients:
                client.start()
            time.sleep(0.2)
            manager.restart(host)
            for client in clients:
                client.join(SECONDS)
            assert failures == []
            assert not any(client.is_alive() for client in clients)
            host.wait_ready()
            os.kill(host.pid, signal.SIGTERM)
            deadline = time.monotonic() + SECONDS
            while alive(host.pid):
                assert time.monotonic() < deadline
                time.sleep(0.01)
    finally:
        manager.close()
