"""Sockets passed by a service manager: LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES."""

import os
import socket
from collections.abc import Mapping, MutableMapping

FIRST_FD = 3
_NAMES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


def activated_sockets(
    environment: MutableMapping[str, str], *, pid: int | None = None
) -> list[tuple[str, socket.socket]]:
    """(name, socket) of what was passed to this process; the variables are removed.

    Raises ValueError when the variables are malformed, OSError when a descriptor is no socket.
    """
    passed = _parse(environment, os.getpid() if pid is None else pid)
    for name in _NAMES:
        environment.pop(name, None)
    sockets = []
    for fd, name in passed:
        os.set_inheritable(fd, False)
        sockets.append((name, socket.socket(fileno=fd)))
    return sockets


def _parse(environment: Mapping[str, str], pid: int) -> list[tuple[int, str]]:
    if environment.get("LISTEN_PID") != str(pid):
        return []
    text = environment.get("LISTEN_FDS", "")
    if not text.isascii() or not text.isdigit() or int(text) > 1024:
        raise ValueError(f"LISTEN_FDS={text!r}")
    count = int(text)
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * (count - len(names))
    return [(FIRST_FD + index, names[index]) for index in range(count)]
