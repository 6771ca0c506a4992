"""Bounds of a build."""

from __future__ import annotations

from dataclasses import dataclass, field

from imagecache.chunks.codec import DEFAULT_LEVEL
from imagecache.flatten.limits import Limits


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """Bounds of a build; none of them reaches an identity."""

    limits: Limits = field(default_factory=Limits)
    level: int = DEFAULT_LEVEL
    threads: int = 0  # that encode chunks; 0: as many as there are cores
    deadline_seconds: float = 3600.0
    worker_memory_bytes: int = 4 << 30
