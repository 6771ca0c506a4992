"""The composition root of stores: a URL and settings become a store and a reader, wrapped.

Reads pass, outermost first: tier -> retry (deadline, budget) -> limits per class -> hedges ->
metering -> the client. Control calls pass: retry -> metering -> the store.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from imagecache.errors import UsageError
from imagecache.store.base import Priority, RangeReader
from imagecache.store.counters import ReadCounters
from imagecache.store.local import LocalReader, LocalStore
from imagecache.store.memory import MemoryReader, MemoryStore
from imagecache.store.metered import MeteredStore
from imagecache.store.opened import URL_FORMS, OpenedStore
from imagecache.store.settings import StoreSettings
from imagecache.store.stream import PiecewiseStream
from imagecache.store.wrappers import LimitedReader, MeteredReader

__all__ = ["OpenedStore", "open_store"]

# As many threads as places, so that demand finds a free one.
_LOCAL_PLACES = {Priority.DEMAND: 8, Priority.PREFETCH: 4, Priority.FILL: 2}


def open_store(url: str, settings: StoreSettings | None = None) -> OpenedStore:
    """The store of a URL; nothing is asked or made yet. UsageError for a URL of no known form.

    `file:///path`, `memory:`, or `s3://BUCKET[/PREFIX]` with options `endpoint` (URL), `region`,
    `profile`, `style` (path or virtual; path where the endpoint is not AWS's) and `tier` (URL).
    Credentials come from the SDK's chain, never from the URL.
    """
    settings = settings or StoreSettings()
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"store URL {url!r} is malformed: {error}", remedy=URL_FORMS) from error
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "a store URL must not hold credentials",
            remedy="use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
        )
    if parts.fragment or port is not None:
        raise UsageError(f"store URL {url!r} is malformed", remedy=URL_FORMS)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and not parts.query:
        return _open_local(url, unquote(parts.path))
    if parts.scheme == "memory" and not (parts.netloc or parts.path or parts.query):
        memory = MemoryStore()
        counters = ReadCounters()
        metered = MeteredReader(MemoryReader(memory), counters.origin)
        store = MeteredStore(memory, counters.control)
        return OpenedStore(url, store, metered, counters, PiecewiseStream(metered))
    if parts.scheme == "s3" and parts.netloc:
        # boto3 takes a quarter of a second to import, which a directory store need not pay.
        from imagecache.store.open_s3 import open_s3  # noqa: PLC0415

        return open_s3(url, settings)
    raise UsageError(f"store URL {url!r} has no known form", remedy=URL_FORMS)


def _open_local(url: str, path: str) -> OpenedStore:
    root = Path(path)
    if not root.is_absolute() or root == Path("/") or "\x00" in path:
        raise UsageError(f"store URL {url!r} needs an absolute directory", remedy=URL_FORMS)
    counters = ReadCounters()
    reader: RangeReader = LocalReader(root, threads=sum(_LOCAL_PLACES.values()))
    reader = MeteredReader(reader, counters.origin)
    # No retries: a disk that failed once answers no better at once. Limits order the classes.
    reader = LimitedReader(reader, _LOCAL_PLACES, counters.origin)
    store = MeteredStore(LocalStore(root), counters.control)
    return OpenedStore(url, store, reader, counters, PiecewiseStream(reader))
