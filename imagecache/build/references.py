"""Images whose chunks a build need not store again: named ones, then the repository's others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.records import RootRecord
from imagecache.build.layers import Placed, fetch_pair
from imagecache.build.spool import Spool
from imagecache.catalog import AliasName, Catalog
from imagecache.errors import Corrupt, NotFound

log = logging.getLogger(__name__)

MAX_OF_REPOSITORY = 3
MAX_NAMED = 8
"""Of each kind; chunks of more images cost memory in the worker and seldom save anything."""


class References:
    """Finds and fetches them, in one generation, for one image."""

    def __init__(
        self, catalog: Catalog, spool: Spool, generation: int, distrusted: frozenset[str]
    ) -> None:
        """Images that name a pack of `distrusted` (hex) are left out."""
        self._catalog = catalog
        self._spool = spool
        self._generation = generation
        self._distrusted = distrusted

    async def find(
        self, key: ImageKey, repository: str, named: Sequence[AliasName]
    ) -> list[Placed]:
        """Manifests and location tables of images in the face of `key`.

        What is not there, or damaged, is left out: the scrub tells of it. Raises Unavailable and
        Denied.
        """
        found: list[Placed] = []
        seen = {key.image}
        for images, most in (
            (self._named(named), MAX_NAMED),
            (self._of_repository(repository), MAX_OF_REPOSITORY),
        ):
            taken = 0
            async for image in images:
                if image in seen or taken >= most:
                    continue
                seen.add(image)
                pair = await self._fetch(ImageKey(image, key.face, key.options), len(found))
                if pair is not None:
                    found.append(pair)
                    taken += 1
        return found

    async def _named(self, names: Sequence[AliasName]) -> AsyncIterator[str]:
        for name in names:
            try:
                yield (await self._catalog.alias(name)).image
            except (NotFound, Corrupt) as error:
                log.warning("reference image %s is not used: %s", name.text, error)

    async def _of_repository(self, repository: str) -> AsyncIterator[str]:
        try:
            names = await self._catalog.aliases(repository)
        except Corrupt:
            return  # a damaged name: this very build may be what mends it
        for name in names:
            yield name.image

    async def _fetch(self, key: ImageKey, number: int) -> Placed | None:
        directory = await asyncio.to_thread(self._spool.directory, f"reference-{number}")
        try:
            root: RootRecord = await self._catalog.root_in(key, self._generation)
            if self._distrusted.intersection(root.packs):
                return None
            names = bytes.fromhex(root.block_image), bytes.fromhex(root.locations)
            return await fetch_pair(self._catalog, directory, "manifests", names, self._generation)
        except (NotFound, Corrupt):
            return None
