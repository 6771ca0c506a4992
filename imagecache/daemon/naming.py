"""Which images a caller from the network may name (I14): public registries, unless configured."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from imagecache.errors import Denied, Unavailable
from imagecache.oci.reference import RegistryReference, parse_reference

LOOKUP_SECONDS = 10.0
_REMEDY = "call over the unix socket, or set [api] private_images"


async def require_public(reference: str) -> None:
    """Raises Denied for this host's files and for registries that are not on public addresses.

    What is behind a public name is looked up; what redirects or token servers name later is
    checked where they are followed.
    """
    parsed = parse_reference(reference)
    if not isinstance(parsed, RegistryReference):
        raise Denied("callers over TCP may not name files of this host", remedy=_REMEDY)
    host = parsed.host
    name = host[1 : host.index("]")] if host.startswith("[") else host.partition(":")[0]
    if name == "docker.io":
        return
    for address in await _addresses(name):
        if not ipaddress.ip_address(address.partition("%")[0]).is_global:
            raise Denied(f"registry {host} is not on a public address", remedy=_REMEDY)


async def _addresses(name: str) -> list[str]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(LOOKUP_SECONDS):
            found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError) as error:
        raise Unavailable(f"registry {name} cannot be looked up: {error}") from error
    return [str(item[4][0]) for item in found]
