"""Metrics of reading: how long reads wait and why, and what each tier and class brought."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from imagecache.buckets import Buckets
from imagecache.cache.counters import FetchCounters
from imagecache.store.base import Priority
from imagecache.store.counters import ReadCounters

# Metric, field of cache.counters.ClassCounters, help; labelled by class of read.
_CLASSES = (
    ("gets", "gets", "Ranged GETs; many per chunk: the image is fragmented."),
    ("bytes", "bytes_fetched", "Bytes fetched; demand high against prefetch: starts not learned."),
    ("chunks", "chunks", "Chunks fetched; high against arena hits: the cache is too small."),
    ("failures", "failures", "Failed fetches; a rise: the store or the way to it is sick."),
)
_FETCH = (
    ("joins", "Reads that found their chunk on its way: fetches the herd was spared."),
    ("upgrades", "Queued fetches that became demand; high: prefetch guesses in the wrong order."),
    ("corrupt_bodies", "Chunks that the store sent wrong; any: an alert."),
    ("repaired", "Of these, right when asked for again; lower than they: the store has them bad."),
    ("overtakes", "Demand reads that went ahead of a stream; high: its order is not the guest's."),
)
# Metric, field of store.counters.ClassCounters, help; labelled by source (tier, origin) and class.
_SOURCES = (
    ("requests", "Reads sent to a source, retries too; origin high against tier: the tier misses."),
    ("bytes", "Bytes that a source sent; high from origin: what the bucket's owner bills."),
    ("errors", "Reads that a source failed; a rise: it is sick, or credentials ran out."),
    ("throttled", "Requests to slow down; any rise: the bucket is asked too much at once."),
    ("retries", "Reads sent again; high: a source fails and recovers, and reads wait longer."),
    ("hedges", "Reads sent a second time beside a slow one; high: its tail is long."),
    ("hedges_won", "Of these, first to answer; near all of them: raise the hedging share."),
)

# Metric, field of store.counters.CallCounters, help; labelled by call.
_CALLS = (
    ("calls", "requests", "Control calls; high: many names, leases or collections, and a bill."),
    ("call_errors", "errors", "Control calls that failed; a rise: the store or its keys are sick."),
)


def read_metrics(fetched: FetchCounters, sources: ReadCounters) -> Iterator[Metric]:
    """All of them, for a scrape."""
    yield histogram(
        "cubecache_stall_seconds",
        "How long reads of guests waited, by cause; high counts in late buckets are what users "
        "feel: cold: learn the start; late: bandwidth; joined: many starts at once.",
        "cause",
        {cause.value: times for cause, times in fetched.waits.items()},
    )
    for name, field, text in _CLASSES:
        family = CounterMetricFamily(f"cubecache_fetch_{name}", text, labels=["class"])
        for kind, counts in zip(Priority, fetched.by_class, strict=True):
            family.add_metric([kind.name.lower()], getattr(counts, field))
        yield family
    for name, text in _FETCH:
        family = CounterMetricFamily(f"cubecache_fetch_{name}", text)
        family.add_metric([], getattr(fetched, name))
        yield family
    both = (("tier", sources.tier), ("origin", sources.origin))
    for name, text in _SOURCES:
        family = CounterMetricFamily(f"cubecache_store_{name}", text, labels=["source", "class"])
        for source, classes in both:
            for kind, counters in zip(Priority, classes, strict=True):
                family.add_metric([source, kind.name.lower()], getattr(counters, name))
        yield family
    latency = HistogramMetricFamily(
        "cubecache_store_seconds",
        "How long reads of a source took; high: it is far, slow or overloaded.",
        labels=["source", "class"],
    )
    for source, classes in both:
        for kind, counters in zip(Priority, classes, strict=True):
            times = counters.times
            latency.add_metric([source, kind.name.lower()], times.cumulative(), times.seconds)
    yield latency
    for name, field, text in _CALLS:
        family = CounterMetricFamily(f"cubecache_store_{name}", text, labels=["call"])
        for call, counted in sources.control.items():
            family.add_metric([call], getattr(counted, field))
        yield family
    for name, count, text in (
        (
            "tier_fallbacks",
            sources.tier_fallbacks,
            "Reads the tier could not answer; high: it is "
            "down or cold, and the bucket carries its load.",
        ),
        (
            "condemned",
            sources.condemned,
            "Reads whose bytes did not match their digest; any: a source changes bytes.",
        ),
    ):
        family = CounterMetricFamily(f"cubecache_store_{name}", text)
        family.add_metric([], count)
        yield family


def histogram(
    name: str, text: str, label: str, values: Mapping[str, Buckets]
) -> HistogramMetricFamily:
    """A histogram family of one label."""
    family = HistogramMetricFamily(name, text, labels=[label])
    for value, times in values.items():
        family.add_metric([value], times.cumulative(), times.seconds)
    return family
