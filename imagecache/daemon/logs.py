"""The daemon's log: text or JSON lines on stderr, escaped, and bounded in rate.

What strangers wrote (names, headers) may be in a message: control characters are escaped in both
formats. What `imagecache.logcontext` says that a line is about (request, export, job, owner), or
what the record carries by `extra`, is a field of it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable

from imagecache.logcontext import FIELDS, current
from imagecache.sections import LogSection

LINES_PER_WINDOW = 50
WINDOW_SECONDS = 10.0
_PACKAGES = ("imagecache", "nbdserver", "preload")


class RateFilter(logging.Filter):
    """Lets each source line log so often per window, then says once how many were dropped."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; errors too are counted."""
        key, now = (record.pathname, record.lineno), self._clock()
        began, count = self._windows.get(key, (now, 0))
        if now - began >= WINDOW_SECONDS:
            if count > LINES_PER_WINDOW:
                dropped = count - LINES_PER_WINDOW
                record.msg = f"{record.msg} ({dropped} like it were left out)"
            began, count = now, 0
        self._windows[key] = (began, count + 1)
        return count < LINES_PER_WINDOW


def _without_traceback(record: logging.LogRecord) -> bool:
    """aiohttp's server logs what is not HTTP with a traceback; our own errors are caught before."""
    record.exc_info = None
    return True


class TextFormatter(logging.Formatter):
    """One line for people, its fields at the end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, control characters escaped."""
        text = _escaped(super().formatMessage(record))
        fields = [f"{name}={_escaped(str(value))}" for name, value in _fields(record).items()]
        return " ".join([text, *fields])


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The object: time (seconds), level, logger, message, fields, error."""
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    given = {name: getattr(record, name) for name in FIELDS if getattr(record, name, None)}
    return {**current(), **given}


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def set_up_logs(section: LogSection) -> None:
    """Sends the packages' logs to stderr in the configured format; may be called again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if section.format == "json" else TextFormatter())
    handler.addFilter(RateFilter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        if type(old) is logging.StreamHandler:
            root.removeHandler(old)
    root.addHandler(handler)
    foreign = logging.getLogger("aiohttp.server")
    foreign.filters = [_without_traceback]
    for name in _PACKAGES:
        logging.getLogger(name).setLevel(section.level.upper())
