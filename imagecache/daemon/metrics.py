"""The daemon's metrics, read from plain counters when Prometheus asks."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from imagecache.store.base import Priority
from preload.jobs import JobState

if TYPE_CHECKING:
    from imagecache.daemon.access import Caller
    from imagecache.daemon.service import Service
    from imagecache.daemon.watched import Watched

# Metric, field of nbdserver's Counters, help. A help text says what a high value means.
_NBD = (
    ("hits", "Reads answered from memory in their batch."),
    ("misses", "Reads that waited for a fetch; high against hits: the cache is cold or too small."),
    ("errors", "Requests answered with an error; any rise deserves a look at the store."),
    ("bytes_sent", "Bytes sent to NBD clients."),
    ("bytes_received", "Bytes received from NBD clients."),
    ("stalls", "Clients closed because they did not read; high: guests hang or are hostile."),
    ("faults", "Failed pages under the arena's map; any: the cache's disk is failing."),
    ("violations", "Clients that broke the protocol; high: something else talks to the socket."),
    ("refused", "Connections over the limits."),
)


# Metric, whether it only grows, field of ArenaStats, help.
_ARENA = (
    ("chunks", False, "chunks", "Chunks held."),
    ("used_bytes", False, "used_bytes", "Disk that the arena occupies; at the budget: it evicts."),
    ("budget_bytes", False, "budget_bytes", "What it may occupy: [cache] budget_bytes."),
    ("pinned", False, "pinned", "Slots that replies in flight hold; high: clients read slowly."),
    ("leased", False, "leased", "Slots whose eviction waits for a reader."),
    ("admitted", True, "admitted", "Chunks taken in; high with high evictions: budget too small."),
    ("refused", True, "refused", "Chunks passed through and not kept; any rise: no room or disk."),
    ("evicted", True, "evicted", "Chunks dropped for room; high: raise the budget."),
    ("wasted_ahead", True, "wasted_ahead", "Fetched ahead, evicted unread; high: fill less."),
    ("quarantined", True, "quarantined", "Local chunks found changed; any: the disk is failing."),
)
# Metric, field of ClassCounters, help; labelled by class of read.
_CLASSES = (
    ("gets", "gets", "Ranged GETs; many per chunk: the image is fragmented."),
    ("bytes", "bytes_fetched", "Bytes fetched; demand high against prefetch: starts not learned."),
    ("chunks", "chunks", "Chunks fetched."),
    ("failures", "failures", "Failed fetches; a rise: the store or the way to it is sick."),
)
_FETCH = (
    ("joins", "Reads that found their chunk on its way: fetches the herd was spared."),
    ("upgrades", "Queued fetches that became demand; high: prefetch guesses in the wrong order."),
    ("corrupt_bodies", "Chunks that the store sent wrong; any: an alert."),
    ("repaired", "Of these, right when asked for again."),
    ("overtakes", "Demand reads that went ahead of a stream."),
)
# Of one export; so many exports have series of their own, the busiest, and the rest is summed.
EXPORT_SERIES = 100
OTHERS = "(others)"
_EXPORT = (
    ("misses", "Reads of an export that waited; high: its start is not learned, or it is cold."),
    ("waited_seconds", "Time that reads of an export waited; the number a guest feels."),
    ("errors", "Reads of an export answered EIO; any rise deserves a look at the store."),
)


class _Collector:
    def __init__(self, service: Service, watched: Watched | None, caller: Caller | None) -> None:
        self._service = weakref.ref(service)
        self._watched = watched
        self._caller = caller

    def collect(self) -> Iterator[Metric]:
        service = self._service()
        if service is None:
            return
        counters = service.nbd.counters
        for name, text in _NBD:
            yield _counter(f"cubecache_nbd_{name}", text, getattr(counters, name))
        yield _gauge("cubecache_nbd_connections", "NBD clients now.", counters.connections)
        yield _gauge("cubecache_ready", "1 once exports are served.", float(service.ready))
        failed = sum(export.failure is not None for export in service.exports())
        yield _gauge("cubecache_exports", "Exports, failed ones too.", len(service.exports()))
        yield _gauge("cubecache_exports_failed", "Exports that are not served; any.", failed)
        stats = service.arena.stats()
        for name, grows, field, text in _ARENA:
            make = _counter if grows else _gauge
            yield make(f"cubecache_arena_{name}", text, getattr(stats, field))
        yield _gauge(
            "cubecache_arena_degraded",
            "1 while the arena takes nothing in: its disk is full or failing.",
            float(stats.degraded is not None),
        )
        yield from self._fetches(service)
        yield from self._jobs(service)
        yield from self._exports(service)

    def _fetches(self, service: Service) -> Iterator[Metric]:
        fetched = service.fetcher.counters
        for name, field, text in _CLASSES:
            family = CounterMetricFamily(f"cubecache_fetch_{name}", text, labels=["class"])
            for kind, counts in zip(Priority, fetched.by_class, strict=True):
                family.add_metric([kind.name.lower()], getattr(counts, field))
            yield family
        for name, text in _FETCH:
            yield _counter(f"cubecache_fetch_{name}", text, getattr(fetched, name))

    def _jobs(self, service: Service) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "cubecache_preloads",
            "Remembered preload jobs by state; many queued: builds are slower than requests.",
            labels=["state"],
        )
        states = Counter(job.state for job in service.jobs.jobs())
        for state in JobState:
            family.add_metric([state.value], states[state])
        yield family

    def _exports(self, service: Service) -> Iterator[Metric]:
        devices = [
            (export.record.name, export.device.counters)
            for export in service.exports()
            if export.device is not None
        ]
        devices.sort(key=lambda item: -item[1].misses)
        for name, text in _EXPORT:
            family = GaugeMetricFamily(f"cubecache_export_{name}", text, labels=["export"])
            for export, counts in devices[:EXPORT_SERIES]:
                family.add_metric([export], getattr(counts, name))
            rest = [getattr(counts, name) for _, counts in devices[EXPORT_SERIES:]]
            if rest:
                family.add_metric([OTHERS], sum(rest))
            yield family


def _counter(name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family


def exposition(
    service: Service, watched: Watched | None = None, caller: Caller | None = None
) -> str:
    """The text format of all metrics; for a caller with an owner, of its exports and jobs only."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service, watched, caller))
    return generate_latest(registry).decode()
