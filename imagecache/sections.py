"""The sections of the configuration: every setting with its type, default and meaning.

A field's metadata says what it means and whether a running daemon takes a new value on SIGHUP.
The values are checked in `imagecache.settings`; nothing here reads a file or the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _setting(default: Any, text: str, *, reload: bool = False) -> Any:
    return field(default=default, metadata={"text": text, "reload": reload})


@dataclass(frozen=True, slots=True)
class CacheSection:
    """[cache]: the host's arena. Sizes in bytes, times in seconds."""

    budget_bytes: int = _setting(20 << 30, "Disk that the host's cache of chunks may occupy.")
    integrity: str = _setting("admission", "Check chunks on `admission`, or on `every-read`.")
    fill: str | None = _setting(
        None,
        "Fetch in the background: whole, hot or none; unset: whole where it fits the budget.",
        reload=True,
    )
    fill_bytes_per_second: int = _setting(
        0, "Bound of each background fill; 0: none. For exports made later.", reload=True
    )
    read_ahead: bool = _setting(
        True, "Fetch ahead of reads that go forward through files.", reload=True
    )
    overlay_bytes: int = _setting(
        10 << 30, "What one writable export may hold; more is ENOSPC. 0: no bound.", reload=True
    )
    stall_seconds: float = _setting(30.0, "A read that waited so long is answered with EIO.")


@dataclass(frozen=True, slots=True)
class StoreSection:
    """[store]: how the bucket is reached."""

    tier_url: str | None = _setting(None, "An HTTP cache in front of the store, by its base URL.")
    ca_file: str | None = _setting(
        None,
        "Certificates that store and tier are checked against, not the system's.",
    )


@dataclass(frozen=True, slots=True)
class EncryptionSection:
    """[encryption]: whether the realm is sealed; chosen at its birth."""

    secrets: str | None = _setting(
        None, "The realm's secrets: file:PATH, env:NAME or command:PROGRAM; unset: in the clear."
    )


@dataclass(frozen=True, slots=True)
class RegistrySection:
    """[registry]: how registries are reached."""

    docker_config: str | None = _setting(
        None, "Docker's config.json with credentials; unset: as Docker finds it.", reload=True
    )
    plain_http: tuple[str, ...] = _setting((), "Hosts spoken to without TLS.", reload=True)
    insecure_tls: tuple[str, ...] = _setting(
        (), "Hosts whose certificate is not verified.", reload=True
    )
    ca_file: str | None = _setting(None, "Certificates trusted besides the system's.", reload=True)
    allowed_private: tuple[str, ...] = _setting(
        (), "Private hosts or networks that redirects and token servers may name.", reload=True
    )


@dataclass(frozen=True, slots=True)
class BuildSection:
    """[build]: bounds of a conversion."""

    level: int = _setting(1, "zstd level of chunks, 1 to 19.", reload=True)
    related: tuple[str, ...] = _setting(
        (), "Images of the store whose chunks new images use again.", reload=True
    )
    threads: int = _setting(0, "Threads that encode chunks; 0: one for each core.", reload=True)
    deadline_seconds: float = _setting(3600.0, "A layer's conversion ends by then.", reload=True)
    worker_memory_bytes: int = _setting(4 << 30, "Memory limit of a worker process.", reload=True)


@dataclass(frozen=True, slots=True)
class PreloadSection:
    """[preload]: the daemon's jobs."""

    concurrency: int = _setting(1, "Builds that run at once, 1 to 8.", reload=True)
    bytes_per_second: int = _setting(
        0, "Bound of all downloads from registries together; 0: none.", reload=True
    )
    queued_per_owner: int = _setting(
        500, "Jobs that one owner may have waiting; more are answered 429.", reload=True
    )


@dataclass(frozen=True, slots=True)
class PricesSection:
    """[prices]: what the store charges, for `stats`; in whatever money. 0: not reckoned."""

    gib_month: float = _setting(0.0, "A GiB stored for a month.")
    thousand_writes: float = _setting(0.0, "1,000 PUT or LIST requests.")
    thousand_reads: float = _setting(0.0, "1,000 GET or HEAD requests.")
    gib_out: float = _setting(0.0, "A GiB read.")


@dataclass(frozen=True, slots=True)
class NbdSection:
    """[nbd]: where exports are served besides the unix socket."""

    tcp: str | None = _setting(None, "HOST:PORT that serves exports too.")


@dataclass(frozen=True, slots=True)
class ApiSection:
    """[api]: the control API besides the unix socket, and who may do what."""

    tcp: str | None = _setting(None, "HOST:PORT of the control API; needs `tokens`.")
    tls_certificate: str | None = _setting(None, "Its certificate chain, PEM.")
    tls_key: str | None = _setting(None, "The certificate's key, PEM.")
    tokens: str | None = _setting(None, "TOML file of tokens (`cubecache token`).", reload=True)
    socket_group: str | None = _setting(None, "Group that may use the control socket.")
    group_role: str = _setting("preload", "What that group may do: read, preload or admin.")
    private_images: bool = _setting(
        False, "Callers over TCP may name this host's files and private registries.", reload=True
    )


@dataclass(frozen=True, slots=True)
class LogSection:
    """[log]: what the daemon writes to stderr."""

    format: str = _setting("text", "`text` or `json`, one object a line.", reload=True)
    level: str = _setting("info", "debug, info, warning or error.", reload=True)
