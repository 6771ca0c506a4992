"""A real docker-registry on a loopback port, with or without basic auth."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

USER = "tester"
PASSWORD = "s3cret-pass"
_BCRYPT = "$2b$05$RItRG178V3lsfMCWc81s8e5XvRJJzqnvh8JdOR.Eg.Wk.0F5nKV7."


class RegistryProcess:
    """Starts on entering, is killed on leaving; `host` is what references start with."""

    def __init__(self, directory: Path, *, auth: bool = False) -> None:
        self._directory = directory
        self._auth = auth

    def __enter__(self) -> RegistryProcess:
        self._directory.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.host = f"127.0.0.1:{self.port}"
        config = self._directory / "config.yml"
        text = (
            "version: 0.1\nlog:\n  level: error\n"
            f"storage:\n  filesystem:\n    rootdirectory: {self._directory / 'store'}\n"
            f"http:\n  addr: {self.host}\n"
        )
        if self._auth:
            htpasswd = self._directory / "htpasswd"
            htpasswd.write_text(f"{USER}:{_BCRYPT}\n")
            text += f"auth:\n  htpasswd:\n    realm: test\n    path: {htpasswd}\n"
        config.write_text(text)
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(config)],
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "HOME": str(self._directory)},
            )
        self._wait()
        return self

    def _wait(self) -> None:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5).close()
                return
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 401:
                    return
            except OSError:
                pass
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError((self._directory / "log").read_text())

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
