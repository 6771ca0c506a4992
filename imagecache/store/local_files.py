"""What the directory store does to files: blocking functions, run in its threads only.

Every function raises OSError freely; `mapped_errors` is the one table to our types.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat as stat_bits
from collections.abc import Iterator
from pathlib import Path

from imagecache.errors import (
    CubecacheError,
    Denied,
    LimitExceeded,
    NoSpace,
    NotFound,
    Rejected,
    Unavailable,
)
from imagecache.store.base import ObjectStat, OriginProtocol, RangePastEnd, is_segment

TEMP_DIR = ".tmp"
LIST_BATCH = 1000
_COPY_BYTES = 1 << 22
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def get_object(root: Path, key: str, limit: int) -> bytes:
    """The whole object, up to `limit` bytes."""
    with _opened(root, key) as (fd, size):
        if size > limit:
            raise LimitExceeded(f"object {key} is {size} bytes, over the limit of {limit}")
        return _read_exactly(fd, key, 0, size)


def stat_object(root: Path, key: str) -> ObjectStat:
    """Size in bytes and time of a regular file."""
    found = os.lstat(root / key)
    if not stat_bits.S_ISREG(found.st_mode):
        raise _foreign(key, found.st_mode)
    return ObjectStat(key=key, size=found.st_size, modified=found.st_mtime)


def delete_object(root: Path, key: str) -> None:
    """Unlink durably; an absent one is fine. Directories stay: removing them races with puts."""
    path = root / key
    try:
        path.unlink()
    except (FileNotFoundError, NotADirectoryError):
        return
    except IsADirectoryError:
        return  # a directory of other keys: this key is absent
    fsync_dir(path.parent)


def read_range(root: Path, key: str, offset: int, length: int) -> bytes:
    """Exactly `length` bytes, with the errors mapped."""
    with mapped_errors(root, key), _opened(root, key) as (fd, size):
        if offset + length > size:
            raise RangePastEnd(f"range {offset}+{length} runs past {key}'s end at {size}")
        return _read_exactly(fd, key, offset, length)


@contextlib.contextmanager
def _opened(root: Path, key: str) -> Iterator[tuple[int, int]]:
    try:
        fd = os.open(root / key, _READ_FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Rejected(f"object {key} is not a regular file") from error
        raise
    try:
        found = os.fstat(fd)
        if not stat_bits.S_ISREG(found.st_mode):
            raise _foreign(key, found.st_mode)
        yield fd, found.st_size
    finally:
        os.close(fd)


def _foreign(key: str, mode: int) -> CubecacheError:
    if stat_bits.S_ISDIR(mode):
        return NotFound(f"object {key} is not in the store: it is a directory of other objects")
    return Rejected(f"object {key} is not a regular file", remedy="remove it and repair the store")


def _read_exactly(fd: int, key: str, offset: int, length: int) -> bytes:
    body = os.pread(fd, length, offset)
    if len(body) == length:
        return body
    pieces = [body]
    done = len(body)
    while done < length:
        piece = os.pread(fd, length - done, offset + done)
        if not piece:
            raise OriginProtocol(f"object {key} ended at {offset + done} while it was read")
        pieces.append(piece)
        done += len(piece)
    return b"".join(pieces)


@contextlib.contextmanager
def locked_temp(directory: Path) -> Iterator[tuple[Path, int]]:
    """A new locked temp (path, descriptor), gone at the end unless it was renamed."""
    path = directory / f"{os.getpid()}-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o666)
    except FileNotFoundError:
        directory.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, flags, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path, fd
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def place(temp: Path, path: Path, only_if_absent: bool) -> bool:
    """Give a finished temp its name in one step; False when `only_if_absent` found one."""
    if not only_if_absent:
        temp.rename(path)
        return True
    try:
        os.link(temp, path)
    except FileExistsError:
        if path.is_dir():
            raise
        return False
    return True


def write_all(fd: int, body: bytes) -> None:
    """Write every byte, however short the single writes are."""
    view = memoryview(body)
    while view:
        view = view[os.write(fd, view[:_COPY_BYTES]) :]


def copy_into(source: Path, target: int) -> None:
    """Copy a file into a descriptor, in the kernel where it can."""
    try:
        opened = source.open("rb")
    except OSError as error:
        raise Rejected(f"file {source} to be stored cannot be read: {error.strerror}") from error
    with opened:
        fd = opened.fileno()
        while True:
            try:
                if not os.copy_file_range(fd, target, _COPY_BYTES * 16):
                    return
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                break
        while piece := os.read(fd, _COPY_BYTES):
            write_all(target, piece)


def fsync_dir(directory: Path) -> None:
    """Make the directory's entries durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def reclaim_temps(directory: Path, age_s: float) -> None:
    """Remove temps that nobody locks and that are older than `age_s` by the directory's clock."""
    with locked_temp(directory) as (_, fd):
        os.utime(fd)
        now = os.fstat(fd).st_mtime
        for path in directory.iterdir():
            with contextlib.suppress(OSError):
                _reclaim_one(path, now - age_s)


def _reclaim_one(path: Path, before: float) -> None:
    fd = os.open(path, _READ_FLAGS)
    try:
        if os.fstat(fd).st_mtime < before:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    finally:
        os.close(fd)


def walk(root: Path, prefix: str) -> Iterator[ObjectStat]:
    """Depth first; only directories that can hold keys of the prefix are opened."""
    start, _, _ = prefix.rpartition("/")
    pending = [start]
    while pending:
        directory = pending.pop()
        try:
            entries = os.scandir(root / directory if directory else root)
        except (FileNotFoundError, NotADirectoryError):
            if not root.is_dir():
                raise  # the store is gone: that is not an empty listing
            continue  # no such prefix, or deleted meanwhile
        with entries:
            for entry in entries:
                key = f"{directory}/{entry.name}" if directory else entry.name
                if not is_segment(entry.name) or not _may_hold(key, prefix):
                    continue  # `.tmp`, and what others put here: never a key
                if entry.is_dir(follow_symlinks=False):
                    pending.append(key)
                elif key.startswith(prefix) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        yield ObjectStat(key=key, size=found.st_size, modified=found.st_mtime)


def _may_hold(key: str, prefix: str) -> bool:
    return key.startswith(prefix) or prefix.startswith(key + "/")


def next_batch(walking: Iterator[ObjectStat]) -> list[ObjectStat]:
    """Up to `LIST_BATCH` objects more; fewer means the end."""
    batch: list[ObjectStat] = []
    for stat in walking:
        batch.append(stat)
        if len(batch) == LIST_BATCH:
            break
    return batch


@contextlib.contextmanager
def mapped_errors(root: Path, key: str) -> Iterator[None]:
    """OSError becomes one of our types: the one table of this module."""
    try:
        yield
    except OSError as error:
        raise _error_of(error, root, key) from error


def _error_of(error: OSError, root: Path, key: str) -> CubecacheError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and root.is_dir():
        return NotFound(f"object {key} is not in the store {root}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"store {root} is full", remedy="free space or move the store")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Denied(f"store {root} refused {key}: {reason}", remedy=f"check who owns {root}")
    if error.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST):
        return Rejected(f"object {key} would be a directory of other objects in {root}")
    return Unavailable(f"store {root} could not serve {key}: {reason}")
