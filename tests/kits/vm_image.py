"""Small root file systems for guests, and NBD servers that are not ours to serve them."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
app:x:1000:1000:App:/home/app:/bin/sh
"""
GROUP = """root:x:0:
daemon:x:1:
app:x:1000:
video:x:44:app
extra:x:2000:daemon,app
"""
APPLETS = (
    "sh cat ls id env pwd echo sleep kill mount stat head dd yes true false printf wc tail sync "
    "grep test mkdir rm touch chmod ps hostname date md5sum seq tr cut awk readlink ip sha256sum"
).split()


def make_tree(directory: Path) -> Path:
    """A root of busybox with users, and files that programs trip over."""
    for name in ("bin", "etc", "root", "home/app", "usr/bin", "proc", "sys", "dev", "tmp", "var"):
        (directory / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", directory / "bin/busybox")
    for applet in APPLETS:
        (directory / "bin" / applet).symlink_to("busybox")
    (directory / "etc/passwd").write_text(PASSWD)
    (directory / "etc/group").write_text(GROUP)
    (directory / "etc/image-release").write_text("made for tests\n")
    (directory / "tmp").chmod(0o1777)
    (directory / "bin/plain-file").write_text("#!/bin/sh\necho never\n")
    (directory / "bin/no-loader").write_text("#!/lib/missing-loader\n")
    (directory / "bin/no-loader").chmod(0o755)
    (directory / "bin/not-a-program").write_bytes(b"\x01\x02\x03 not a program")
    (directory / "bin/not-a-program").chmod(0o755)
    (directory / "home/app/secret").write_text("for app only\n")
    for path in (directory / "home/app", directory / "home/app/secret"):
        shutil.chown(path, 1000, 1000)
    (directory / "home/app/secret").chmod(0o600)
    return directory


def make_erofs(tree: Path, image: Path) -> Path:
    """The tree as an EROFS image, by erofs-utils."""
    subprocess.run(["mkfs.erofs", "--quiet", str(image), str(tree)], check=True, timeout=300)
    return image


class NbdServer:
    """nbdkit's file plugin on a unix socket, until `stop`."""

    def __init__(self, image: Path, socket: Path) -> None:
        self.socket = socket
        self._process = subprocess.Popen(
            ["nbdkit", "--foreground", "--exit-with-parent", "--readonly", "--unix", str(socket),
             "file", str(image)]
        )  # fmt: skip
        end = time.monotonic() + 20
        while not socket.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise AssertionError("nbdkit did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
