"""Reading local files that others made: never through a link, never a pipe, never past a cap.

All functions but `copy_in_thread` block and run on worker threads.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from imagecache.errors import LimitExceeded, Rejected, Unavailable
from imagecache.oci.descriptor import Descriptor
from imagecache.oci.partial import PartialBlob, file_error, is_complete

_PIECE = 1 << 20


def open_regular(path: Path) -> int:
    """Open a regular file for reading; raises `NotFound`, `Denied`, `Rejected`.

    A symbolic link as the last part of the path is refused: a layout could point anywhere.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise file_error(error, path) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise Rejected(f"{path} is not a regular file")
    return file


def read_regular(path: Path, *, limit: int) -> bytes:
    """The whole of a regular file of at most `limit` bytes."""
    file = open_regular(path)
    try:
        size = os.fstat(file).st_size
        if size > limit:
            raise LimitExceeded(f"{path} has more than {limit} bytes")
        return read_range(file, 0, size, path)
    finally:
        os.close(file)


def read_range(file: int, offset: int, length: int, path: Path) -> bytes:
    """Exactly `length` bytes at `offset`; a shorter file is `Rejected`."""
    body = bytearray()
    while len(body) < length:
        try:
            piece = os.pread(file, min(length - len(body), _PIECE), offset + len(body))
        except OSError as error:
            raise file_error(error, path) from None
        if not piece:
            raise Rejected(f"{path} ends early")
        body += piece
    return bytes(body)


def copy_verified(
    file: int,
    offset: int,
    descriptor: Descriptor,
    target: Path,
    report: Callable[[int], None],
    *,
    what: str,
) -> None:
    """Copy a blob out of an open file to `target`, verified on the way; `report` gets counts.

    A copy, not a hard link: a link would let whoever writes the source change what we verified.
    """
    if is_complete(target, descriptor.digest, descriptor.size):
        report(descriptor.size)
        return
    blob = PartialBlob(target, descriptor.digest, descriptor.size)
    blob.open()
    try:
        while blob.length < descriptor.size:
            try:
                piece = os.pread(
                    file, min(descriptor.size - blob.length, _PIECE), offset + blob.length
                )
            except OSError as error:
                raise file_error(error, target) from None
            if not piece:
                blob.discard()
                raise Rejected(f"{what} ends after {blob.length} of {descriptor.size} bytes")
            report(blob.append([piece]))
        if not blob.commit():
            blob.discard()
            raise Rejected(f"{what} does not match its digest {descriptor.digest}")
    finally:
        blob.close()


async def copy_in_thread(
    executor: Executor,
    copy: Callable[[Callable[[int], None]], None],
    progress: Callable[[int], None],
) -> None:
    """Run a copy on a worker thread; its counts reach `progress` on the loop.

    A cancelled call ends the copy at its next piece, so that the thread does not outlive us long.
    """
    loop = asyncio.get_running_loop()
    abandoned = threading.Event()

    def report(count: int) -> None:
        if abandoned.is_set():
            raise Unavailable("the copy was given up")
        loop.call_soon_threadsafe(progress, count)

    try:
        await loop.run_in_executor(executor, copy, report)
    finally:
        abandoned.set()
