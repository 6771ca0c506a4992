"""Blobs on their way into the spool, one after another, ahead of the conversions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from imagecache.build.progress import Progress, Report, Stage
from imagecache.build.spool import Spool
from imagecache.oci.source import ImageLayer, ImageSource


class Download:
    """One layer's blob. `begun`: some of it can be read; `done`: all of it, and it is verified.

    `restarts` counts how often bytes that could be read before were replaced by others.
    """

    def __init__(self, layer: ImageLayer, path: Path) -> None:
        self.layer = layer
        self.path = path
        self.begun = asyncio.Event()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.restarts = 0
        self._length = 0

    def grew(self, length: int) -> None:
        """The first `length` bytes of the partial file are there."""
        if length < self._length:
            self.restarts += 1
        self._length = length
        if length:
            self.begun.set()

    def end(self, error: Exception | None) -> None:
        """It is complete, or has failed."""
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
            self.done.exception()  # not everybody waits for it
        self.begun.set()


class Downloads:
    """The blobs of one image's missing layers; counts what came, and the seconds it took."""

    def __init__(self, source: ImageSource, spool: Spool, report: Report) -> None:
        self.downloaded_bytes = 0
        self.seconds = 0.0
        self._source = source
        self._spool = spool
        self._report = report

    @asynccontextmanager
    async def running(self, missing: Iterable[ImageLayer]) -> AsyncIterator[dict[Any, Download]]:
        """Downloads by diff id; what has not ended when the context is left is cancelled."""
        blob = self._spool.blob
        found = {x.diff_id: Download(x, blob(str(x.descriptor.digest))) for x in missing}
        task = asyncio.create_task(self._run(list(found.values())))
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, downloads: list[Download]) -> None:
        for number, download in enumerate(downloads, 1):
            try:
                await self._pull(download, number, len(downloads))
            except Exception as error:
                for left in downloads[number - 1 :]:
                    left.end(error)
                return
            download.end(None)

    async def _pull(self, download: Download, number: int, count: int) -> None:
        if await asyncio.to_thread(download.path.exists):
            return  # a resumed build: only verified blobs carry the final name
        size = download.layer.descriptor.size

        def progress(length: int) -> None:
            self._report(Progress(Stage.PULL, number, count, length, size))
            download.grew(length)

        self._report(Progress(Stage.PULL, number, count, 0, size))
        began = time.monotonic()
        await self._source.fetch_blob(download.layer.descriptor, download.path, progress)
        self.seconds += time.monotonic() - began
        self.downloaded_bytes += size
