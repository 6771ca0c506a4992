"""Presigned URLs: one per object and hour, renewed before they end and when they are refused."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from yarl import URL

from imagecache.store.rangeclient import Refusal
from imagecache.store.s3_client import URL_LIFE_S, BucketClient

_MAX_URLS = 16384
_MARGIN_S = 300.0
_TEMPORARY_S = 300.0  # session credentials are refreshed ten minutes before their end at the latest


class PresignedUrls:
    """The UrlSource of an S3 origin; signing runs in the client's threads, once per key."""

    def __init__(self, client: BucketClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._urls: OrderedDict[str, tuple[URL, float]] = OrderedDict()
        self._signing: dict[str, asyncio.Task[URL]] = {}

    def known(self, key: str) -> URL | None:
        """The kept URL, while it is good for some minutes more."""
        kept = self._urls.get(key)
        if kept is None or kept[1] <= self._clock():
            return None
        return kept[0]

    async def find(self, key: str) -> URL:
        """The kept URL or a new one; one signature however many ask."""
        url = self.known(key)
        if url is not None:
            return url
        task = self._signing.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._sign(key))
            self._signing[key] = task
            task.add_done_callback(lambda done: self._signed(key, done))
        return await asyncio.shield(task)

    async def refused(self, key: str, refusal: Refusal) -> bool:
        """Forget the URL; True: a fresh signature (healed, where it can be) is worth a try."""
        self._urls.pop(key, None)
        await self._client.heal_soon(refusal.code, refusal.status, refusal.date)
        return True

    async def _sign(self, key: str) -> URL:
        text = await self._client.presign(key)
        life_s = URL_LIFE_S - _MARGIN_S
        if self._client.credentials_are_temporary:
            life_s = _TEMPORARY_S
        url = URL(text, encoded=True)
        self._urls[key] = (url, self._clock() + life_s)
        self._urls.move_to_end(key)
        if len(self._urls) > _MAX_URLS:
            self._urls.popitem(last=False)
        return url

    def _signed(self, key: str, task: asyncio.Task[URL]) -> None:
        del self._signing[key]
        if not task.cancelled():
            task.exception()  # seen here, so that a caller's cancelling leaves no warning
