"""What a service manager is told, over the datagram socket in NOTIFY_SOCKET (sd_notify(3))."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence

logger = logging.getLogger(__name__)


def notify(
    state: str, environment: Mapping[str, str] = os.environ, *, fds: Sequence[int] = ()
) -> bool:
    """Sends `READY=1`, `STOPPING=1`, `STATUS=...`, with descriptors for its store.

    False where nobody listens. Never raises.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1)
            sock.connect(address)
            socket.send_fds(sock, [state.encode()], fds)
    except OSError as error:
        logger.warning("the service manager is not told %r: %s", state, error)
        return False
    return True
