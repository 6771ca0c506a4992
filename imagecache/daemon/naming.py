"""How a request names an image, and which ones a caller from the network may name (I14).

Those are images of public registries, unless `[api] private_images` is set.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from imagecache.composition import ImageRequest
from imagecache.daemon.bodies import Field
from imagecache.daemon.operations import Call
from imagecache.errors import Denied, Unavailable
from imagecache.oci.reference import RegistryReference, parse_reference
from imagecache.settings import Settings

PLATFORM = Field("platform", "text", "OS/ARCH of a multi-platform image.", most=64)
FACE = Field("fs", "text", "erofs, or ext4 with `:free=BYTES`.", most=64)
LOOKUP_SECONDS = 10.0
_REMEDY = "call over the unix socket, or set [api] private_images"


async def requested(settings: Settings, call: Call, reference: str) -> ImageRequest:
    """The image that a body names, if the caller may name it."""
    image = ImageRequest.parse(
        reference,
        call.body["platform"],
        call.body["fs"] or "erofs",
        call.body.get("related") or (),
    )
    if call.caller.remote and not settings.api.private_images:
        await require_public(image.reference)
    return image


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
