"""Log files of containers: `TIME stdout F text`, one file a run, bounded; written and read here.

Format: Kubernetes' CRI log format (kubernetes/design-proposals-archive, kubelet-cri-logging). A
line over 16 KiB is cut into parts tagged P, the last one F. STATE/pods/UID/logs/CONTAINER/N.log is
run N; when it is full it becomes N.log.1, and the one before that is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from imagecache.errors import NotFound

LINE_LIMIT: Final = 16 * 1024
FILE_LIMIT: Final = 16 * 1024 * 1024
RUNS_KEPT: Final = 2  # this run's files, and the one's before
_POLL_SECONDS: Final = 0.2
_TAIL_LIMIT: Final = 100_000
_NAME = re.compile(r"(\d+)\.log")


class LogWriter:
    """One container run's file: a new one, or with `resumed` the newest that is there.

    Blocking; called from one thread at a time.
    """

    def __init__(self, directory: Path, *, resumed: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        newest = max(_runs(directory), default=-1)
        run = max(newest if resumed else newest + 1, 0)
        self._path = directory / f"{run}.log"
        self._pending = {"stdout": b"", "stderr": b""}
        for old in _runs(directory):
            if old <= run - RUNS_KEPT:
                for path in (directory / f"{old}.log", directory / f"{old}.log.1"):
                    path.unlink(missing_ok=True)
        self._file: BinaryIO = self._path.open("ab")

    def write(self, stream: str, content: bytes, at: float) -> None:
        """Adds what a stream wrote; a line's rest waits for its end."""
        lines = (self._pending[stream] + content).split(b"\n")
        rest = lines.pop()
        out = bytearray()
        stamp = _stamp(at)
        for line in lines:
            _put(out, stamp, stream, line)
        while len(rest) > LINE_LIMIT:
            out += stamp + f" {stream} P ".encode() + rest[:LINE_LIMIT] + b"\n"
            rest = rest[LINE_LIMIT:]
        self._pending[stream] = rest
        self._append(bytes(out))

    def lost(self, stream: str, count: int, at: float) -> None:
        """Says that bytes are missing here."""
        out = bytearray()
        _put(out, _stamp(at), stream, f"[cubecache: {count} bytes lost here]".encode())
        self._append(bytes(out))

    def close(self, at: float) -> None:
        """Writes what had no end of line, and closes the file."""
        out = bytearray()
        for stream, rest in self._pending.items():
            if rest:
                _put(out, _stamp(at), stream, rest)
        self._append(bytes(out))
        self._file.close()

    def _append(self, content: bytes) -> None:
        if not content:
            return
        if self._file.tell() + len(content) > FILE_LIMIT:
            self._file.close()
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._file = self._path.open("ab")
        self._file.write(content)
        self._file.flush()


@dataclass(frozen=True, slots=True)
class LogLine:
    """One piece of a log: `text` ends with a newline where the line does."""

    at: float
    stream: str
    text: bytes


@dataclass(frozen=True, slots=True)
class LogQuery:
    """Which lines: of the run before, not older than, the last so many, and whether to wait on."""

    previous: bool = False
    since: float = 0.0  # seconds since 1970
    tail: int | None = None
    follow: bool = False


async def read_log(
    directory: Path, query: LogQuery, ended: Callable[[], bool]
) -> AsyncIterator[LogLine]:
    """The lines of a container's log. With `follow` until `ended` and nothing more is there.

    Raises NotFound where there is no previous run.
    """
    runs = await asyncio.to_thread(_runs, directory)
    if query.previous:
        if len(runs) < 2:
            raise NotFound("there is no previous run of this container")
        runs = [runs[-2]]
    run = runs[-1] if runs else 0
    before = await asyncio.to_thread(_read_old, directory / f"{run}.log.1")
    reader = _Follower(directory / f"{run}.log")
    try:
        lines = [*before, *await asyncio.to_thread(reader.more)]
        wanted = [line for line in lines if line.at >= query.since]
        if query.tail is not None:
            wanted = wanted[-min(query.tail, _TAIL_LIMIT) :] if query.tail else []
        for line in wanted:
            yield line
        while query.follow and not query.previous:
            over = ended()
            newer = await asyncio.to_thread(reader.more)
            for line in newer:
                yield line
            newest = (await asyncio.to_thread(_runs, directory) or [run])[-1]
            if newest > run and not newer:
                run = newest
                reader.close()
                reader = _Follower(directory / f"{run}.log")
            elif over and not newer:
                return
            elif not newer:
                await asyncio.sleep(_POLL_SECONDS)
    finally:
        reader.close()


class _Follower:
    """Reads a growing file line by line, and on when it is replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._inode = 0
        self._rest = b""

    def more(self) -> list[LogLine]:
        """The whole lines since the last call. Blocking."""
        lines = self._take()
        if self._file is not None and self._replaced():
            lines += self._take()
            self.close()
            lines += self._take()
        return lines

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._rest = b""

    def _replaced(self) -> bool:
        try:
            return self._path.stat().st_ino != self._inode
        except FileNotFoundError:
            return False

    def _take(self) -> list[LogLine]:
        if self._file is None:
            with contextlib.suppress(FileNotFoundError):
                self._file = self._path.open("rb")
                self._inode = self._path.stat().st_ino
        if self._file is None:
            return []
        *whole, self._rest = (self._rest + self._file.read(FILE_LIMIT)).split(b"\n")
        return [line for raw in whole for line in _parsed(raw)]


def _read_old(path: Path) -> list[LogLine]:
    try:
        return [line for raw in path.read_bytes().split(b"\n") for line in _parsed(raw)]
    except FileNotFoundError:
        return []


def _parsed(raw: bytes) -> Iterator[LogLine]:
    parts = raw.split(b" ", 3)
    if len(parts) != 4:
        return
    try:
        at = datetime.fromisoformat(parts[0][:26].decode().rstrip("Z") + "+00:00").timestamp()
    except ValueError:
        return
    end = b"\n" if parts[2] == b"F" else b""
    yield LogLine(at, parts[1].decode("ascii", "replace"), parts[3] + end)


def _runs(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _put(out: bytearray, stamp: bytes, stream: str, line: bytes) -> None:
    while len(line) > LINE_LIMIT:
        out += stamp + f" {stream} P ".encode() + line[:LINE_LIMIT] + b"\n"
        line = line[LINE_LIMIT:]
    out += stamp + f" {stream} F ".encode() + line + b"\n"


def _stamp(at: float) -> bytes:
    moment = datetime.fromtimestamp(at, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond:06d}000Z".encode()
