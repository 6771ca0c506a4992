"""Read-ahead by disk neighbours: chunks touched one after another make a stream with a window."""

from __future__ import annotations

from imagecache.cache.fetch import Fetcher
from imagecache.cache.image import ImageMap
from imagecache.store.base import Priority

_STREAMS = 8
_SKIP = 2  # extents that a reader may leave out and still count as going forward
_FIRST_WINDOW = 4
_MAX_WINDOW = 64  # extents, 16 MiB where chunks are full


class _Stream:
    """A reader that goes forward: the extent it touched last, and how far was asked for ahead."""

    __slots__ = ("ahead", "last", "run", "window")

    def __init__(self, index: int, window: int) -> None:
        self.last = index
        self.ahead = index + 1
        self.run = 0
        self.window = window


class ReadAhead:
    """One export's streams. `touched` costs a few comparisons, and only on first touches.

    The window of a new stream adapts: it halves when a stream is dropped with most of its window
    unread, and doubles when a stream used all it had asked for.
    """

    def __init__(self, image: ImageMap, fetcher: Fetcher) -> None:
        self._image = image
        self._fetcher = fetcher
        self._streams: list[_Stream] = []  # most recent last
        self._first_window = _FIRST_WINDOW

    def touched(self, first: int, last: int) -> None:
        """Extents are read that this image's exports had no position for."""
        for place in range(len(self._streams) - 1, -1, -1):
            stream = self._streams[place]
            if 0 <= first - stream.last <= _SKIP:
                if last == stream.last:
                    return
                if place != len(self._streams) - 1:
                    self._streams.append(self._streams.pop(place))
                self._forward(stream, last)
                return
        if len(self._streams) == _STREAMS:
            self._retire(self._streams.pop(0))
        self._streams.append(_Stream(last, self._first_window))

    def _forward(self, stream: _Stream, last: int) -> None:
        stream.run += last - stream.last
        stream.last = last
        # The next window is asked for when half of the last one is used.
        if stream.ahead - last > stream.window // 2:
            return
        start = max(stream.ahead, last + 1)
        end = min(last + 1 + stream.window, len(self._image.starts))
        stream.ahead = max(end, stream.ahead)
        stream.window = min(stream.window * 2, _MAX_WINDOW)
        self._ask(range(start, end))

    def _ask(self, extents: range) -> None:
        image, table = self._image, self._fetcher.arena.table
        ordinals = dict.fromkeys(image.ordinals[index] for index in extents)
        wanted = [n for n in ordinals if table.checked(image.digest(n)) < 0]
        if wanted:
            self._fetcher.request(image, wanted, Priority.PREFETCH)

    def _retire(self, stream: _Stream) -> None:
        unread = stream.ahead - stream.last - 1
        if stream.run and unread * 2 > stream.window // 2:
            self._first_window = max(1, self._first_window // 2)
        elif stream.run >= self._first_window:
            self._first_window = min(_MAX_WINDOW, self._first_window * 2)
