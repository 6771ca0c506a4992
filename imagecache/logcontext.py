"""What the log lines of a piece of work are about: request, export, job, owner.

A context variable: what a task starts inherits it, so that a line logged far below still names its
request. The daemon's formatters read it; without them it costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

FIELDS = ("request", "export", "job", "owner")
_about: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039  never mutated


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """Names what the lines logged inside are about; fields of FIELDS, empty ones left out."""
    token = _about.set({**_about.get(), **{name: x for name, x in fields.items() if x}})
    try:
        yield
    finally:
        _about.reset(token)


def current() -> Mapping[str, str]:
    """The fields of whoever logs now."""
    return _about.get()
