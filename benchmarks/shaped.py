"""The settings of the shaper that benchmarks put before a store and a registry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """Milliseconds to each first byte, and bytes per second for all connections together."""

    name: str
    first_byte_ms: float
    bytes_per_second: int


LINKS = {
    "far": Link("20 ms, 100 MB/s", 20, 100_000_000),
    "near": Link("5 ms, 1 GB/s", 5, 1_000_000_000),
}
