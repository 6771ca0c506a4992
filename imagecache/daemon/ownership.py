"""Which images an owner may know of: what it preloaded (as far as jobs are kept) or exports."""

from __future__ import annotations

from imagecache.composition import ImageRequest, alias_name
from imagecache.daemon.access import Caller
from imagecache.daemon.service import Service
from imagecache.errors import NotFound
from imagecache.oci.reference import parse_reference


def owned_images(service: Service, caller: Caller) -> frozenset[str] | None:
    """Manifest digests of the caller's images; None: it may know of all of them."""
    if not caller.owner:
        return None
    exported = {
        export.record.image
        for export in service.exports()
        if caller.sees(export.record.owner or "")
    }
    preloaded = {
        str(job.result["image"])
        for job in service.jobs.jobs()
        if job.result is not None and caller.sees(job.owner)
    }
    return frozenset(exported | preloaded)


async def require_owned(service: Service, caller: Caller, image: ImageRequest) -> None:
    """Raises NotFound for an image that an owner has not preloaded, in the words of an absent one.

    Preloading one that another owner has preloaded costs a look-up, so nobody waits for this.
    """
    owned = owned_images(service, caller)
    if owned is None:
        return
    name = alias_name(parse_reference(image.reference))
    try:
        digest = await service.catalog.resolve_name(name)
    except NotFound:
        digest = ""
    if digest not in owned:
        raise NotFound(
            f"image {image.reference} is not in realm {service.settings.realm}",
            remedy=f"cubecache preload {image.reference}",
        )
