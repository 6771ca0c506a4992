"""What a registry source may do and how long it may take; made by the composition root alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from imagecache.oci.throttle import Throttle

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class RegistryLimits:
    """Caps and deadlines; sizes in bytes, times in seconds."""

    manifest_bytes: int = 4 * MIB
    config_bytes: int = 4 * MIB
    token_bytes: int = 1 * MIB
    blob_bytes: int = 1 << 40
    layers: int = 512
    index_entries: int = 1024
    index_depth: int = 3
    redirects: int = 5
    header_line_bytes: int = 16 * KIB
    header_lines: int = 128
    attempts: int = 5  # in a row without a new byte
    backoff_seconds: float = 0.5
    backoff_cap_seconds: float = 30.0
    retry_after_cap_seconds: float = 120.0
    connect_seconds: float = 15.0
    head_seconds: float = 60.0  # from the request to the end of the reply's headers
    small_seconds: float = 300.0  # one manifest, config or token, retries and waits included
    blob_base_seconds: float = 900.0  # a blob's deadline is this plus its size / blob_floor
    blob_floor_bytes_per_second: int = 64 * KIB
    stall_window_seconds: float = 60.0
    stall_bytes_per_second: int = 1 * KIB
    stalls: int = 3  # connections dropped for being slow, per blob
    helper_seconds: float = 30.0
    batch_bytes: int = 1 * MIB  # handed to the writing thread at a time


@dataclass(frozen=True)
class RegistrySettings:
    """How to reach registries; hosts are written as in references: `name` or `name:port`.

    Loopback registries are spoken to by plain HTTP unless named in `tls_hosts`. Addresses that
    are not public are reached only where the user named the registry itself, or where
    `allowed_private` (hosts, `host:port`, or CIDR networks) says so. `allowed_realms` are pairs
    (registry host, realm host): token servers outside the registry's own domain that may see
    its credentials.
    """

    docker_config: Path | None = None
    helper_path: str | None = None  # a PATH for docker-credential-*; None: the process's own
    plain_http_hosts: frozenset[str] = frozenset()
    tls_hosts: frozenset[str] = frozenset()
    insecure_tls_hosts: frozenset[str] = frozenset()
    ca_file: Path | None = None
    allowed_private: frozenset[str] = frozenset()
    allowed_realms: frozenset[tuple[str, str]] = frozenset()
    foreign_urls: bool = False
    limits: RegistryLimits = field(default_factory=RegistryLimits)
    throttle: Throttle | None = None  # of blobs that come over the network
