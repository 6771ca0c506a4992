"""An NFS server that nobody here wrote, on loopback: nfs-ganesha over a directory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kits.s3_servers import free_port

_CONFIGURATION = """
NFS_CORE_PARAM {{
    Protocols = 4;
    Bind_addr = 127.0.0.1;
    NFS_Port = {port};
    Enable_NLM = false;
    Enable_RQUOTA = false;
}}
NFSV4 {{
    Graceless = true;
    RecoveryBackend = fs;
    RecoveryRoot = "{state}";
    Minor_Versions = 1, 2;
}}
EXPORT {{
    Export_Id = 1;
    Path = "{path}";
    Pseudo = /export;
    Access_Type = RW;
    Squash = No_Root_Squash;
    SecType = sys;
    Transports = TCP;
    FSAL {{ Name = VFS; }}
}}
"""


@contextmanager
def nfs_server(directory: Path, scratch: Path) -> Iterator[int]:
    """The port of a server whose /export is this directory, from the time it listens."""
    port = free_port()
    state = scratch / "state"
    state.mkdir()
    configuration, log = scratch / "ganesha.conf", scratch / "ganesha.log"
    configuration.write_text(_CONFIGURATION.format(port=port, path=directory, state=state))
    process = subprocess.Popen(
        ["ganesha.nfsd", "-F", "-f", str(configuration), "-L", str(log),
         "-p", str(scratch / "ganesha.pid"), "-N", "EVENT"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not (log.exists() and "NFS SERVER INITIALIZED" in log.read_text(errors="replace")):
            told = log.read_text(errors="replace")[-2000:] if log.exists() else "no log"
            assert process.poll() is None, told
            assert time.monotonic() < end, told
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=30)
