"""What to fetch ahead of a reader: planned by touched extents, the files they lie in, and luck.

Pure state, no I/O. A reader that goes forward is a *stream* with a window. The window ends with the
file that is read; it reaches into the next file once the reader went from one file into the next
one of its directory, as programs do that load a directory; and across directories once it did that
too. Where files are not known, disk neighbours stand for them. What was asked for and read makes
first windows longer, what was not makes them shorter.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

STREAMS = 8
SKIP = 2  # extents that a reader may leave out and still count as going forward
FIRST_WINDOW = 4
MAX_WINDOW = 128  # extents, 32 MiB where chunks are full
REST_OF_FILE = 4  # a file's rest is asked for at once where it is at most so many windows long


@dataclass(frozen=True, slots=True)
class FileRuns:
    """The files of one disk: bytes [start, end) in disk order, and the directory of each."""

    starts: array[int]  # 'Q'
    ends: array[int]  # 'Q'
    folders: array[int]  # 'I'; neighbours with one number are neighbours in a directory

    def at(self, offset: int) -> int:
        """The file at a disk offset, or the last one before it; -1 before the first."""
        return bisect_right(self.starts, offset) - 1

    def folder_end(self, file: int) -> int:
        """Where the run of files of one directory ends that a file is in."""
        folder, last = self.folders[file], file
        while last + 1 < len(self.folders) and self.folders[last + 1] == folder:
            last += 1
            if last - file >= MAX_WINDOW * 64:
                break  # blocks of files of one block each: no window is longer
        return self.ends[last]


class _Stream:
    """A reader that goes forward: what it touched last, and how far was asked for ahead."""

    __slots__ = (
        "ahead",
        "asked",
        "crossed",
        "file",
        "last",
        "left_folder",
        "run",
        "used",
        "window",
    )

    def __init__(self, index: int, window: int, file: int) -> None:
        self.last = index
        self.ahead = index + 1
        self.run = 0
        self.window = window
        self.file = file
        self.crossed = False  # went from a file into the next one of its directory
        self.left_folder = False
        self.asked = self.used = 0


class AheadPlan:
    """The streams of one export. `touched` answers what to ask for now."""

    def __init__(self, starts: array[int], ends: array[int]) -> None:
        """Columns of the disk's extents, in bytes."""
        self.files: FileRuns | None = None
        self.first_window = FIRST_WINDOW
        self.asked = self.used = 0
        self._starts, self._ends = starts, ends
        self._streams: list[_Stream] = []  # most recent last

    @property
    def goes_forward(self) -> bool:
        """Whether somebody reads forward, so that files are worth knowing."""
        return any(stream.run > 1 for stream in self._streams)

    def touched(self, first: int, last: int) -> range:
        """Extents [first, last] are read that had no known position; the extents to ask for."""
        for place in range(len(self._streams) - 1, -1, -1):
            stream = self._streams[place]
            if 0 <= first - stream.last <= SKIP:
                if last == stream.last:
                    return range(0)
                if place != len(self._streams) - 1:
                    self._streams.append(self._streams.pop(place))
                return self._forward(stream, last)
        if len(self._streams) == STREAMS:
            self._retire(self._streams.pop(0))
        self._streams.append(_Stream(last, self.first_window, self._file_of(last)))
        return range(0)

    def _forward(self, stream: _Stream, last: int) -> range:
        stream.used += max(0, min(last, stream.ahead - 1) - stream.last)
        stream.run += last - stream.last
        stream.last = last
        self._follow_files(stream)
        # The next window is asked for when half of the last one is used.
        if stream.ahead - last > stream.window // 2:
            return range(0)
        bound = self._bound(stream)
        start = max(stream.ahead, last + 1)
        end = min(last + 1 + stream.window, bound)
        rest = bound - start
        if self.files is not None and 0 < rest <= min(REST_OF_FILE * stream.window, MAX_WINDOW):
            end = bound
        stream.window = min(stream.window * 2, MAX_WINDOW)
        if end <= start:
            return range(0)
        stream.asked += end - start
        stream.ahead = end
        return range(start, end)

    def _file_of(self, index: int) -> int:
        return -1 if self.files is None else self.files.at(self._starts[index])

    def _follow_files(self, stream: _Stream) -> None:
        """Notes whether the reader went on into a neighbour."""
        files, file = self.files, self._file_of(stream.last)
        if files is None or file == stream.file:
            return
        if file >= 0 and stream.file >= 0:
            same = files.folders[file] == files.folders[stream.file]
            stream.crossed = stream.crossed or same
            stream.left_folder = stream.left_folder or not same
        stream.file = file

    def _bound(self, stream: _Stream) -> int:
        """The extent before which the window ends."""
        files = self.files
        file = self._file_of(stream.last)
        if files is None or file < 0 or stream.left_folder:
            return len(self._starts)
        # Of the files that share an extent, the last one: all of them are here already.
        file = files.at(self._ends[stream.last] - 1)
        end = files.folder_end(file) if stream.crossed else files.ends[file]
        return bisect_left(self._starts, end)

    def _retire(self, stream: _Stream) -> None:
        """Learns from a stream that was dropped: how much of what it asked for was read."""
        self.asked += stream.asked
        self.used += stream.used
        if stream.asked and stream.used * 2 < stream.asked:
            self.first_window = max(1, self.first_window // 2)
        elif stream.asked and stream.run >= self.first_window:
            self.first_window = min(MAX_WINDOW, self.first_window * 2)
