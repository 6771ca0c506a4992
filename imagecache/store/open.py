"""The composition root of stores: a URL and settings become a store and a reader, wrapped.

Reads pass, outermost first: tier -> retry (deadline, budget) -> limits per class -> hedges ->
metering -> the client. Control calls pass: retry -> the store.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from yarl import URL

from imagecache.errors import UsageError
from imagecache.store.base import Priority, RangeReader, Store, check_key
from imagecache.store.counters import ClassCounters, ReadCounters
from imagecache.store.hedge import HedgedReader
from imagecache.store.local import LocalReader, LocalStore
from imagecache.store.memory import MemoryReader, MemoryStore
from imagecache.store.rangeclient import HttpRangeReader
from imagecache.store.retry import RetryReader, RetryStore
from imagecache.store.s3 import S3Store
from imagecache.store.s3_client import BucketClient, S3Location
from imagecache.store.s3_urls import PresignedUrls
from imagecache.store.settings import StoreSettings
from imagecache.store.stream import FirstStream, PiecewiseStream, StreamReader
from imagecache.store.tier import TieredReader, TierUrls
from imagecache.store.wrappers import LimitedReader, MeteredReader

_FORMS = "file:///path, s3://bucket/prefix?endpoint=URL&region=NAME, memory:"
# As many threads as places, so that demand finds a free one.
_LOCAL_PLACES = {Priority.DEMAND: 8, Priority.PREFETCH: 4, Priority.FILL: 2}
_S3_OPTIONS = frozenset({"endpoint", "region", "profile", "style", "tier"})


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """A store ready for use; `url` names it in messages and holds no secret."""

    url: str
    store: Store
    reader: RangeReader
    counters: ReadCounters
    streamer: StreamReader

    async def close(self) -> None:
        """End its connections and threads."""
        await self.reader.close()
        await self.store.close()


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
        raise UsageError(f"store URL {url!r} is malformed: {error}", remedy=_FORMS) from error
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "a store URL must not hold credentials",
            remedy="use AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
        )
    if parts.fragment or port is not None:
        raise UsageError(f"store URL {url!r} is malformed", remedy=_FORMS)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and not parts.query:
        return _open_local(url, unquote(parts.path))
    if parts.scheme == "memory" and not (parts.netloc or parts.path or parts.query):
        memory = MemoryStore()
        counters = ReadCounters()
        metered = MeteredReader(MemoryReader(memory), counters.origin)
        return OpenedStore(url, memory, metered, counters, PiecewiseStream(metered))
    if parts.scheme == "s3" and parts.netloc:
        return _open_s3(url, settings)
    raise UsageError(f"store URL {url!r} has no known form", remedy=_FORMS)


def _open_local(url: str, path: str) -> OpenedStore:
    root = Path(path)
    if not root.is_absolute() or root == Path("/") or "\x00" in path:
        raise UsageError(f"store URL {url!r} needs an absolute directory", remedy=_FORMS)
    counters = ReadCounters()
    reader: RangeReader = LocalReader(root, threads=sum(_LOCAL_PLACES.values()))
    reader = MeteredReader(reader, counters.origin)
    # No retries: a disk that failed once answers no better at once. Limits order the classes.
    reader = LimitedReader(reader, _LOCAL_PLACES, counters.origin)
    return OpenedStore(url, LocalStore(root), reader, counters, PiecewiseStream(reader))


def _open_s3(url: str, settings: StoreSettings) -> OpenedStore:
    location, tier_url = parse_s3(url)
    tier_url = tier_url or settings.tier_url
    tls = ssl.create_default_context(cafile=settings.ca_file) if settings.ca_file else None
    client = BucketClient(location, settings.s3, ca_file=settings.ca_file)
    counters = ReadCounters()
    urls = PresignedUrls(client)
    proxy = settings.proxies.get(urlsplit(location.endpoint or "https://").scheme)
    client_of_origin = HttpRangeReader(
        urls, settings.http, name=str(location), tls=tls, proxy=proxy
    )
    streams: list[tuple[StreamReader, ClassCounters]] = [
        (client_of_origin, counters.origin[Priority.PREFETCH])
    ]
    origin = _wrapped(client_of_origin, counters.origin, settings)
    reader: RangeReader = origin
    if tier_url:
        base = _http_url(tier_url)
        http = HttpRangeReader(TierUrls(base, urls), settings.http, name=f"tier {base}", tls=tls)
        streams.insert(0, (http, counters.tier[Priority.PREFETCH]))
        tier: RangeReader = MeteredReader(http, counters.tier)
        tier = LimitedReader(tier, settings.places, counters.tier)
        reader = TieredReader(tier, origin, counters, patience_s=settings.tier_patience_s)
    store = RetryStore(S3Store(client, settings.retry), settings.retry)
    return OpenedStore(url, store, reader, counters, FirstStream(streams))


def _wrapped(
    client: RangeReader, counters: tuple[ClassCounters, ...], settings: StoreSettings
) -> RangeReader:
    reader: RangeReader = MeteredReader(client, counters)
    reader = HedgedReader(reader, counters, share=settings.hedge_share)
    reader = LimitedReader(reader, settings.places, counters)
    return RetryReader(reader, settings.retry, settings.deadlines_s, counters)


def parse_s3(url: str) -> tuple[S3Location, str | None]:
    """The location and the tier of an `s3://` URL; UsageError."""
    parts = urlsplit(url)
    try:
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True))
    except ValueError:
        options = {}
    unknown = set(options) - _S3_OPTIONS
    if unknown or (parts.query and not options):
        raise UsageError(
            f"store URL {url!r} has unknown options: {', '.join(sorted(unknown)) or parts.query}",
            remedy=f"known ones are {', '.join(sorted(_S3_OPTIONS))}",
        )
    prefix = unquote(parts.path).strip("/")
    if prefix:
        check_key(prefix)
    style = options.get("style", "")
    if style not in ("", "path", "virtual"):
        raise UsageError(f"store URL {url!r}: style is path or virtual")
    endpoint = options.get("endpoint") or None
    if endpoint is not None:
        endpoint = str(_http_url(endpoint)).rstrip("/")
    location = S3Location(
        bucket=parts.netloc,
        prefix=prefix,
        endpoint=endpoint,
        region=options.get("region") or None,
        profile=options.get("profile") or None,
        path_style={"": None, "path": True, "virtual": False}[style],
    )
    return location, options.get("tier") or None


def _http_url(text: str) -> URL:
    try:
        url = URL(text, encoded=True)
        usable = url.scheme in ("http", "https") and url.host and url.port
    except ValueError:
        usable = False
    if not usable or url.user is not None or url.raw_query_string or url.fragment:
        raise UsageError(f"{text!r} is not the URL of an HTTP endpoint", remedy="http://HOST:PORT")
    return url
