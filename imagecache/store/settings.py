"""Everything about a store that can be set, with its defaults; frozen, built by the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imagecache.store.base import Priority
from imagecache.store.policy import RetryPolicy
from imagecache.store.rangeclient import HttpLimits


def _places() -> Mapping[Priority, int]:
    return {Priority.DEMAND: 64, Priority.PREFETCH: 32, Priority.FILL: 16}


def _deadlines_s() -> Mapping[Priority, float]:
    return {Priority.DEMAND: 30.0, Priority.PREFETCH: 60.0, Priority.FILL: 120.0}


@dataclass(frozen=True, slots=True)
class S3Limits:
    """Threads, and deadlines of the control plane in seconds; `call_s` is a whole call's."""

    threads: int = 8
    connect_s: float = 5.0
    read_s: float = 30.0
    call_s: float = 120.0


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Times in seconds. `places` are reads under way per class, `deadlines_s` a read's, retries in.

    `tier_url` is the base URL of a shared HTTP cache in front of an S3 origin, `tier_patience_s`
    what it may take before the origin is asked. `ca_file` holds the certificates that HTTPS
    endpoints are checked against, instead of the system's. `remember_in` is a directory that keeps
    for a day what was found out about the store; None: each process finds out.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    places: Mapping[Priority, int] = field(default_factory=_places)
    deadlines_s: Mapping[Priority, float] = field(default_factory=_deadlines_s)
    http: HttpLimits = field(default_factory=HttpLimits)
    s3: S3Limits = field(default_factory=S3Limits)
    hedge_share: float = 0.05
    tier_url: str | None = None
    tier_patience_s: float = 1.0
    ca_file: Path | None = None
    remember_in: Path | None = None
    proxies: Mapping[str, str] = field(default_factory=dict)
