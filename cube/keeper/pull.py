"""A container's image as an export of the cache's daemon."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cube.pod.model import Container
from imagecache.errors import NotFound
from preload.client import Client, ExportHandle, handle


async def export_image(
    client: Client, container: Container, *, platform: str | None, socket: Path, name: str
) -> ExportHandle:
    """The image's disk on a socket of its own, built first where nobody has; what an earlier
    keeper exported under this name is ended. Raises what the daemon answers.
    """
    with contextlib.suppress(NotFound):
        await client.unexport(name, force=True)
    if container.pull == "Never":
        body = {
            "image": container.image,
            "platform": platform,
            "fs": "erofs",
            "socket": str(socket),
            "name": name,
        }
        try:
            return handle(await client.call("POST", "/v1/exports", body))
        except NotFound as error:
            raise NotFound(
                f"{container.image} is not in the cache, and imagePullPolicy is Never",
                remedy=f"cubecache preload {container.image}",
            ) from error
    return await client.export(container.image, socket=socket, name=name, platform=platform)
