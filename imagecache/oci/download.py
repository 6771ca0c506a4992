"""One blob from an HTTP origin into a file: streamed, resumed, bounded, verified.

The hot path: one connection, reads of up to a megabyte, and a worker thread that hashes and
writes one batch while the loop receives the next. Memory is two batches, whatever the size.
State: a `PartialBlob`, and how often the origin has failed.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from imagecache.errors import NotFound, Rejected, Unavailable
from imagecache.oci.challenge import retry_delay
from imagecache.oci.descriptor import Descriptor
from imagecache.oci.pacing import Patience, ThroughputFloor
from imagecache.oci.partial import PartialBlob, is_complete
from imagecache.oci.settings import RegistryLimits
from imagecache.oci.throttle import Throttle
from imagecache.oci.transport import OriginProtocol, Reply, Retryable

T = TypeVar("T")
Ask = Callable[[Mapping[str, str]], AbstractAsyncContextManager[Reply]]
Progress = Callable[[int], None]

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)\Z")
_SLOW_DISK_SECONDS = 1.0


class Stalled(Retryable):
    """The origin sent fewer bytes than the throughput floor for a whole window."""


class BlobDownload:
    """Downloads one descriptor's blob; `ask` sends the GET with the headers it is given."""

    def __init__(
        self,
        ask: Ask,
        descriptor: Descriptor,
        target: Path,
        *,
        progress: Progress,
        limits: RegistryLimits,
        executor: Executor,
        what: str,
        throttle: Throttle | None = None,
    ) -> None:
        self._ask = ask
        self._size = descriptor.size
        self._digest = descriptor.digest
        self._target = target
        self._blob = PartialBlob(target, descriptor.digest, descriptor.size)
        self._tell = progress
        self._told = -1
        self._limits = limits
        self._executor = executor
        self._what = what
        self._throttle = throttle
        self._etag: str | None = None
        self._loop = asyncio.get_running_loop()
        self._floor = ThroughputFloor(
            window_seconds=limits.stall_window_seconds,
            bytes_per_second=limits.stall_bytes_per_second,
            now=self._loop.time(),
        )

    async def run(self) -> None:
        """Bring the blob to its target; returns when it is there, verified and durable.

        `progress` gets the count of bytes that are written to the partial file in order and
        hashed; a lower count than before means that the file began anew. An interrupted
        download leaves its partial file; a rejected one leaves nothing.
        Raises `Rejected`, `NotFound`, `Denied`, `NoSpace`, `Busy`, `Unavailable`.
        """
        if await self._in_thread(is_complete, self._target, self._digest, self._size):
            self._progress(self._size)
            return
        limits = self._limits
        seconds = limits.blob_base_seconds + self._size / limits.blob_floor_bytes_per_second
        if self._throttle is not None:
            seconds += 4 * self._throttle.seconds_for(self._size)  # others may share it
        await self._in_thread(self._blob.open)
        try:
            async with asyncio.timeout(seconds):
                await self._fill()
        except TimeoutError:
            raise Unavailable(
                f"{self._what}: not complete after {seconds:.0f} s",
                remedy="try again: it goes on from where it is",
            ) from None
        except (Rejected, NotFound):
            await self._in_thread(self._blob.discard)
            raise
        finally:
            # Not on the loop: an append that outlived a cancellation holds the blob's lock.
            await asyncio.shield(self._in_thread(self._blob.close))

    def _progress(self, count: int) -> None:
        if count != self._told:
            self._told = count
            self._tell(count)

    async def _fill(self) -> None:
        patience = Patience(self._limits.attempts)
        mismatches = stalls = 0
        while True:
            if self._blob.length:
                self._progress(self._blob.length)
            if self._blob.length == self._size:
                if await self._in_thread(self._blob.commit):
                    self._progress(self._size)
                    return
                mismatches += 1
                if mismatches >= 2:
                    raise Rejected(f"{self._what} does not match its digest {self._digest}")
                await self._restart()
                continue
            try:
                await self._attempt()
                if self._blob.length == self._size:
                    continue
                problem: Rejected | Retryable | OriginProtocol = Rejected(
                    f"{self._what} ends after {self._blob.length} of {self._size} bytes"
                )
            except Stalled as error:
                problem = error
                stalls += 1
                if stalls >= self._limits.stalls:
                    raise
            except (Retryable, OriginProtocol) as error:
                problem = error
            if patience.failed(self._blob.length):
                raise problem
            await self._pause(problem, patience.failures)

    async def _pause(self, problem: Exception, failures: int) -> None:
        """Wait before the next attempt: not at all after progress, else backed off."""
        asked = problem.retry_after if isinstance(problem, Retryable) else None
        if failures == 0 and asked is None:
            return
        await asyncio.sleep(wait_seconds(asked, failures - 1, self._limits))
        self._floor.restart(self._loop.time())

    async def _restart(self) -> None:
        await self._in_thread(self._blob.restart)
        self._etag = None
        self._progress(0)

    async def _attempt(self) -> None:
        """One GET, from where the file ends; whatever arrives is kept, also when it raises."""
        offset = self._blob.length
        headers = {"Accept": "*/*"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self._etag is not None:
                headers["If-Range"] = self._etag
        async with self._ask(headers) as reply:
            if reply.status == 416 and offset:
                await self._restart()
                raise OriginProtocol(f"{self._what}: the origin has no byte {offset}")
            if reply.status == 206 and offset:
                self._check_range(await self._range_start(reply, offset), offset)
            elif reply.status == 200:
                if offset:
                    await self._restart()
            else:
                raise OriginProtocol(f"{self._what}: unexpected status {reply.status}")
            etag = reply.header("ETag")
            self._etag = etag if etag and etag.startswith('"') else None
            coming = reply.response.content_length
            if coming is not None and self._blob.length + coming > self._size:
                raise self._too_long()
            await self._receive(reply)

    async def _range_start(self, reply: Reply, offset: int) -> int:
        """The offset at which a 206 begins; a wrong one costs what we have, and no byte of it."""
        match = _CONTENT_RANGE.match(reply.header("Content-Range") or "")
        if match is not None:
            first, last = int(match[1]), int(match[2])
            total_right = match[3] in {"*", str(self._size)}
            if first == offset and first <= last < self._size and total_right:
                return first
        await self._restart()
        return -1

    def _check_range(self, start: int, offset: int) -> None:
        if start != offset:
            raise OriginProtocol(f"{self._what}: the origin answers another range than asked for")

    async def _receive(self, reply: Reply) -> None:
        """Stream a body into the blob: reading and writing overlap by one batch."""
        content = reply.response.content
        window = self._limits.stall_window_seconds
        writing: asyncio.Future[int] | None = None
        batch: list[bytes] = []
        held = 0
        room = self._size - self._blob.length
        try:
            async with asyncio.timeout(None) as stall:
                while True:
                    stall.reschedule(self._loop.time() + window)
                    piece = await content.readany()
                    stall.reschedule(None)
                    if not piece:
                        break
                    now = self._loop.time()
                    self._floor.note(len(piece), now)
                    if self._floor.too_slow(now):
                        raise TimeoutError
                    room -= len(piece)
                    if room < 0:
                        raise self._too_long()
                    batch.append(piece)
                    held += len(piece)
                    if held >= self._limits.batch_bytes:
                        writing = await self._hand_over(writing, batch)
                        batch, held = [], 0
                    if self._throttle is not None and await self._throttle.take(len(piece)) > 0.1:
                        self._floor.restart(self._loop.time())  # a wait of our own choice
        except TimeoutError:
            self._floor.restart(self._loop.time())
            raise Stalled(
                f"{self._what}: under {self._limits.stall_bytes_per_second} bytes/s "
                f"for {window:g} s"
            ) from None
        finally:
            # What came before a broken connection is good: keep it for the next attempt.
            writing = await self._hand_over(writing, batch)
            if writing is not None:
                self._progress(await writing)

    async def _hand_over(
        self, writing: asyncio.Future[int] | None, batch: list[bytes]
    ) -> asyncio.Future[int] | None:
        """Wait for the write under way, report it, and start the next one."""
        if writing is not None:
            began = self._loop.time()
            self._progress(await writing)
            if self._loop.time() - began > _SLOW_DISK_SECONDS:
                self._floor.restart(self._loop.time())  # our disk was slow, not the origin
        return self._in_thread(self._blob.append, batch) if batch else None

    def _too_long(self) -> Rejected:
        return Rejected(f"{self._what} is longer than the {self._size} bytes of its descriptor")

    def _in_thread(self, call: Callable[..., T], *args: object) -> asyncio.Future[T]:
        return self._loop.run_in_executor(self._executor, call, *args)


def wait_seconds(retry_after: str | None, attempt: int, limits: RegistryLimits) -> float:
    """Seconds to wait now, by `retry_delay` with this process's clock and chance."""
    return retry_delay(
        retry_after,
        attempt=max(attempt, 0),
        now=datetime.now(UTC),
        jitter=random.random(),
        backoff=limits.backoff_seconds,
        backoff_cap=limits.backoff_cap_seconds,
        header_cap=limits.retry_after_cap_seconds,
    )
