"""Which images an owner may know of: what it preloaded (as far as jobs are kept) or exports."""

from __future__ import annotations

from imagecache.daemon.access import Caller
from imagecache.daemon.service import Service


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
