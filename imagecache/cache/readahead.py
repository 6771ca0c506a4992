"""Read-ahead: what the plan says is asked for behind demand and in front of every fill."""

from __future__ import annotations

from collections.abc import Callable

from imagecache.cache.aheadplan import AheadPlan
from imagecache.cache.fetch import Fetcher
from imagecache.cache.image import ImageMap
from imagecache.store.base import Priority


class ReadAhead:
    """One export's streams. `touched` costs a few comparisons, and only on first touches."""

    def __init__(self, image: ImageMap, fetcher: Fetcher) -> None:
        self.want_files: Callable[[], None] | None = None
        """Called once, when somebody reads forward and the image's files are not known yet."""
        self.plan = AheadPlan(image.starts, image.ends)
        self._image = image
        self._fetcher = fetcher

    def touched(self, first: int, last: int) -> None:
        """Extents are read that this image's exports had no position for."""
        plan = self.plan
        if plan.files is None:
            plan.files = self._image.files
            if plan.files is None and self.want_files is not None and plan.goes_forward:
                want, self.want_files = self.want_files, None
                want()
        ask = plan.touched(first, last)
        if ask:
            self._ask(ask)

    def _ask(self, extents: range) -> None:
        image, table = self._image, self._fetcher.arena.table
        ordinals = dict.fromkeys(image.ordinals[index] for index in extents)
        wanted = [n for n in ordinals if table.checked(image.digest(n)) < 0]
        if wanted:
            self._fetcher.request(image, wanted, Priority.PREFETCH)
