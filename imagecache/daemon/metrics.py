"""The daemon's metrics, read from plain counters when Prometheus asks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from imagecache.daemon.metricsreads import histogram, read_metrics
from preload.jobs import JobState

if TYPE_CHECKING:
    from imagecache.daemon.access import Caller
    from imagecache.daemon.builds import Builds
    from imagecache.daemon.service import Service
    from imagecache.daemon.watched import Watched

# Metric, field of nbdserver's Counters, help. A help text says what a high value means.
_NBD = (
    ("hits", "Reads answered from memory in their batch; high is good."),
    ("misses", "Reads that waited for a fetch; high against hits: the cache is cold or too small."),
    ("errors", "Requests answered with an error; any rise deserves a look at the store."),
    ("bytes_sent", "Bytes sent to NBD clients; high: what guests read, and this host's main work."),
    ("bytes_received", "Bytes received from NBD clients; high: guests write a lot."),
    ("stalls", "Clients closed because they did not read; high: guests hang or are hostile."),
    ("faults", "Failed pages under the arena's map; any: the cache's disk is failing."),
    ("violations", "Clients that broke the protocol; high: something else talks to the socket."),
    (
        "refused",
        "Connections over the limits; any: guests cannot attach, or somebody floods the socket.",
    ),
)


# Metric, whether it only grows, field of ArenaStats, help.
_ARENA = (
    ("chunks", False, "chunks", "Chunks held; high is good: they are reads without the store."),
    ("used_bytes", False, "used_bytes", "Disk that the arena occupies; at the budget: it evicts."),
    (
        "budget_bytes",
        False,
        "budget_bytes",
        "What it may occupy, [cache] budget_bytes; high against the disk: others go short.",
    ),
    ("pinned", False, "pinned", "Slots that replies in flight hold; high: clients read slowly."),
    (
        "leased",
        False,
        "leased",
        "Slots whose eviction waits for a reader; high: clients read slowly.",
    ),
    ("admitted", True, "admitted", "Chunks taken in; high with high evictions: budget too small."),
    ("refused", True, "refused", "Chunks passed through and not kept; any rise: no room or disk."),
    ("evicted", True, "evicted", "Chunks dropped for room; high: raise the budget."),
    ("wasted_ahead", True, "wasted_ahead", "Fetched ahead, evicted unread; high: fill less."),
    ("quarantined", True, "quarantined", "Local chunks found changed; any: the disk is failing."),
)
# Metric and field of Builds, help.
_BUILDS = (
    ("downloaded_bytes", "Bytes pulled from registries; high: layers change that should not."),
    ("stored_bytes", "Bytes written to the store; near those downloaded: little is shared."),
    ("chunks", "Chunks of the images that were built."),
    (
        "seconds",
        "Time that these builds took; high against their number: registry or disk is slow.",
    ),
    ("new_chunks", "Of these, stored anew; near all of them: versions share nothing."),
)
COLLECTIONS_AGE_SECONDS = 300.0
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
        self._service = service
        self._watched = watched
        self._caller = caller

    def collect(self) -> Iterator[Metric]:
        service = self._service
        if self._caller is None or not self._caller.owner:
            yield from self._host(service)
        yield from self._jobs(service)
        yield from self._exports(service)

    def _host(self, service: Service) -> Iterator[Metric]:
        """What is of all owners."""
        counters = service.nbd.counters
        for name, text in _NBD:
            yield _counter(f"cubecache_nbd_{name}", text, getattr(counters, name))
        yield _gauge(
            "cubecache_nbd_connections",
            "NBD clients now; high: many guests depend on this one process.",
            counters.connections,
        )
        yield _gauge("cubecache_ready", "1 once exports are served.", float(service.ready))
        failed = sum(export.failure is not None for export in service.exports())
        yield _gauge(
            "cubecache_exports",
            "Exports, failed ones too; high: nobody unexports what ended.",
            len(service.exports()),
        )
        yield _gauge(
            "cubecache_exports_failed",
            "Exports that are not served; any: see their failure.",
            failed,
        )
        stats = service.arena.stats()
        for name, grows, field, text in _ARENA:
            make = _counter if grows else _gauge
            yield make(f"cubecache_arena_{name}", text, getattr(stats, field))
        yield _gauge(
            "cubecache_arena_degraded",
            "1 while the arena takes nothing in: its disk is full or failing.",
            float(stats.degraded is not None),
        )
        yield from read_metrics(service.fetcher.counters, service.opened.counters)
        yield from _builds(service.builds)
        if self._watched is not None:
            yield from self._watching(self._watched)

    def _watching(self, watched: Watched) -> Iterator[Metric]:
        yield histogram(
            "cubecache_api_seconds",
            "How long the control API's answers took; high: the loop is held up, or the store is "
            "slow. Watches and long polls take as long as they are asked to.",
            "operation",
            dict(watched.timings.by_operation),
        )
        late = HistogramMetricFamily(
            "cubecache_loop_late_seconds",
            "How late the event loop woke; high: something blocks it, and all guests wait.",
        )
        late.add_metric([], watched.loop.late.cumulative(), watched.loop.late.seconds)
        yield late
        yield _gauge(
            "cubecache_watchers",
            "Open event streams; at 32: no more are let in.",
            watched.streams.count,
        )
        seen = watched.realm.collections(COLLECTIONS_AGE_SECONDS)
        if seen is None:
            return
        yield _counter(
            "cubecache_realm_collections",
            "Collections of the realm that have begun, on any host; none for long: garbage stays.",
            seen.begun,
        )
        if seen.last_seen is not None:
            yield _gauge(
                "cubecache_realm_collection_timestamp_seconds",
                "When the last collection was last at work; far back: none runs any more.",
                seen.last_seen,
            )
        family = GaugeMetricFamily(
            "cubecache_realm_generations",
            "Generations by state; many retired or closing: collections do not come to an end.",
            labels=["state"],
        )
        for state, count in seen.generations.items():
            family.add_metric([state], count)
        yield family

    def _sees(self, owner: str) -> bool:
        return self._caller is None or self._caller.sees(owner)

    def _jobs(self, service: Service) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "cubecache_preloads",
            "Remembered preload jobs by state; many queued: builds are slower than requests.",
            labels=["state"],
        )
        states = Counter(job.state for job in service.jobs.jobs() if self._sees(job.owner))
        for state in JobState:
            family.add_metric([state.value], states[state])
        yield family

    def _exports(self, service: Service) -> Iterator[Metric]:
        devices = [
            (export.record.name, export.device.counters)
            for export in service.exports()
            if export.device is not None and self._sees(export.record.owner or "")
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


def _builds(builds: Builds) -> Iterator[Metric]:
    family = CounterMetricFamily(
        "cubecache_builds",
        "Preloads that ended, by how; failed high: registry or store; found high: asked in vain.",
        labels=["end"],
    )
    for end in ("built", "found", "failed", "stopped"):
        family.add_metric([end], getattr(builds, end))
    yield family
    for name, text in _BUILDS:
        yield _counter(f"cubecache_build_{name}", text, getattr(builds, name))


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
    return _text(list(_Collector(service, watched, caller).collect()), caller)


async def exposed(service: Service, watched: Watched, caller: Caller) -> str:
    """As `exposition`; the numbers are read at once, and made text beside the event loop."""
    found = list(_Collector(service, watched, caller).collect())
    return await asyncio.to_thread(_text, found, caller)


class _Read(Collector):
    """Metrics that have been read already."""

    def __init__(self, found: list[Metric]) -> None:
        self._found = found

    def collect(self) -> list[Metric]:
        return self._found


def _text(found: list[Metric], caller: Caller | None) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Read(found))
    if caller is None or not caller.owner:
        ProcessCollector(registry=registry)
    return generate_latest(registry).decode()
