"""The daemon's metrics, read from plain counters when Prometheus asks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from imagecache.daemon.service import Service

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


class _Collector:
    def __init__(self, service: Service) -> None:
        self._service = weakref.ref(service)

    def collect(self) -> Iterator[Metric]:
        service = self._service()
        if service is None:
            return
        for name, text in _NBD:
            yield _counter(f"cubecache_nbd_{name}", text, getattr(service.nbd.counters, name))
        yield _gauge(
            "cubecache_nbd_connections",
            "NBD clients connected now.",
            service.nbd.counters.connections,
        )
        yield _gauge("cubecache_exports", "Exports served now.", len(service.exports()))
        yield from _numbers(
            "cubecache_arena",
            service.arena.stats(),
            "Arena state; used near budget with many evictions: raise [cache] budget_bytes.",
        )
        yield from _numbers(
            "cubecache_fetch",
            service.fetcher.counters,
            "Fetcher totals; many failures: the store or the way to it is sick.",
        )


def _counter(name: str, text: str, value: float) -> Metric:
    family = CounterMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _numbers(prefix: str, record: Any, text: str) -> Iterable[Metric]:
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield _gauge(f"{prefix}_{item.name}", text, value)


def exposition(service: Service) -> str:
    """The text format of all metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service))
    return generate_latest(registry).decode()
