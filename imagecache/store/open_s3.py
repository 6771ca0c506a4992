"""Opening a bucket: the client, its wrappers, and the shared tier in front of it."""

from __future__ import annotations

import ssl
from urllib.parse import parse_qsl, unquote, urlsplit

from yarl import URL

from imagecache.errors import UsageError
from imagecache.store.base import Priority, RangeReader, check_key
from imagecache.store.counters import ClassCounters, ReadCounters
from imagecache.store.hedge import HedgedReader
from imagecache.store.metered import MeteredStore
from imagecache.store.opened import OpenedStore
from imagecache.store.rangeclient import HttpRangeReader
from imagecache.store.remembered import Remembered
from imagecache.store.retry import RetryReader, RetryStore
from imagecache.store.s3 import S3Store
from imagecache.store.s3_client import BucketClient, S3Location
from imagecache.store.s3_urls import PresignedUrls
from imagecache.store.settings import StoreSettings
from imagecache.store.stream import FirstStream, StreamReader
from imagecache.store.tier import TieredReader, TierUrls
from imagecache.store.wrappers import LimitedReader, MeteredReader

_S3_OPTIONS = frozenset({"endpoint", "region", "profile", "style", "tier"})


def open_s3(url: str, settings: StoreSettings) -> OpenedStore:
    """The store of an `s3://` URL; UsageError."""
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
    bucket = S3Store(client, settings.retry, remembered=Remembered(settings.remember_in))
    store = RetryStore(MeteredStore(bucket, counters.control), settings.retry)
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
