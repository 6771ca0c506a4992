"""The build pipeline: reference in, committed block image out."""

from __future__ import annotations

import logging
import time

from imagecache.blockimage.generations import State
from imagecache.blockimage.keys import ImageKey
from imagecache.blockimage.manifest import Face
from imagecache.blockimage.records import RootRecord
from imagecache.build.job import BuildJob, BuildOrder, result_of
from imagecache.build.progress import BuildResult, Progress, Report, Stage
from imagecache.build.settings import BuildSettings
from imagecache.build.spool import Spool
from imagecache.build.spooled import SpoolServing
from imagecache.catalog import AliasName, Catalog
from imagecache.errors import Busy, Corrupt, NotFound
from imagecache.leases.build import BuildLeases, LeaseLost
from imagecache.oci.platform import Platform
from imagecache.oci.source import ImageSource

__all__ = ["BuildSettings", "Builder"]

log = logging.getLogger(__name__)

ATTEMPTS = 3
"""Builds of one image before giving up: each more means that a generation closed meanwhile."""


class Builder:
    """Builds images of one realm through one spool; the caller holds the builder's lock."""

    def __init__(
        self,
        catalog: Catalog,
        spool: Spool,
        settings: BuildSettings,
        leases: BuildLeases | None = None,
    ) -> None:
        self.catalog = catalog
        self.spool = spool
        self.settings = settings
        self.leases = leases or BuildLeases(catalog)

    async def build(
        self,
        source: ImageSource,
        platform: Platform,
        *,
        face: Face,
        options: str,
        alias: AliasName,
        report: Report,
        distrusted: frozenset[str] | None = None,
        references: tuple[AliasName, ...] = (),
        serving: SpoolServing | None = None,
    ) -> BuildResult:
        """Builds and commits one image, or finds it committed.

        With `distrusted` (names of packs, in hex) it is built again in any case, and nothing of
        those packs, or of objects that cannot be read, is relied on. Chunks of `references` are
        not stored again. `serving` reads the image from the spool while it is being stored.

        Raises the typed errors of every part; nothing half-made is visible after one.
        """
        started = time.monotonic()
        report(Progress(Stage.RESOLVE, 0, 0))
        image = await source.resolve(platform)
        resolved = time.monotonic() - started
        key = ImageKey(str(image.digest), face, options)
        order = BuildOrder(
            alias=alias,
            report=report,
            distrusted=distrusted,
            references=references,
            serving=serving,
        )
        for _ in range(ATTEMPTS):
            job = BuildJob(
                catalog=self.catalog,
                spool=self.spool,
                settings=self.settings,
                source=source,
                image=image,
                key=key,
                order=order,
            )
            try:
                root, result = await self._build_or_meet(job, platform)
            except LeaseLost as error:
                log.warning("starting over: %s", error)
                continue
            await self._point(alias, str(image.digest))
            # What is written while its generation closes may have missed the collector's look.
            if await self._settled(root):
                break
        else:
            raise Busy(
                f"{alias.text} was overtaken by collection or another builder {ATTEMPTS} times",
                remedy="preload it again",
            )
        result = result or result_of(root, alias)
        result.stages[Stage.RESOLVE] = resolved
        result.seconds = time.monotonic() - started
        return result

    async def _build_or_meet(
        self, job: BuildJob, platform: Platform
    ) -> tuple[RootRecord, BuildResult | None]:
        """The root, and the result where it was built here and not found or built by another."""
        name = job.order.alias.text
        met = await self.leases.meet(
            job.key,
            lambda holder: log.info("%s is being built by %s", name, holder),
            anew=job.repairing,
        )
        if isinstance(met, RootRecord):
            return met, None
        job.lease = met
        async with met.kept():
            return await job.run(platform)

    async def _settled(self, root: RootRecord) -> bool:
        return await self.catalog.state_of(root.generation) is State.ACTIVE

    async def _point(self, alias: AliasName, image: str) -> None:
        try:
            if (await self.catalog.alias(alias)).image == image:
                return
        except (NotFound, Corrupt):
            pass
        await self.catalog.put_alias(alias, image)
