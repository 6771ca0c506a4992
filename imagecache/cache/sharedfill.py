"""What the fills of one image on one host have in common, so that a hundred exports cost one."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from imagecache.cache.lease import Lease

if TYPE_CHECKING:
    from imagecache.cache.arena import Arena
    from imagecache.cache.image import ImageMap


class SharedFill:
    """One right to stay, held as long as anybody holds it; one order; one fill that brings all.

    `leader` is the fill that does, or did; None where nobody has begun.
    """

    def __init__(self) -> None:
        self.order: array[int] | None = None
        self.leader: object | None = None
        self._lease: Lease | None = None
        self._holders = 0

    def hold(self, image: ImageMap, arena: Arena, share: float) -> bool:
        """Leases all chunks, or shares in that; False where leases would pass `share` of it."""
        if self._lease is None:
            room = arena.settings.budget_bytes * share - arena.leased_bytes
            if image.chunk_bytes > room:
                return False
            self._lease = arena.lease(image.digests(), weight=image.chunk_bytes)
        self._holders += 1
        return True

    def let_go(self) -> None:
        """The inverse of a `hold` that answered True."""
        self._holders -= 1
        if not self._holders and self._lease is not None:
            self._lease.release()
            self._lease = None
            self.leader = None
