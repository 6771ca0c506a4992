"""What a collection tells: what it would do or did, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from imagecache.collect.plan import Sweep
from imagecache.collect.snapshot import Snapshot


@dataclass(slots=True)
class CollectReport:
    """One collection; sizes in stored bytes. `doomed` is what is or was to be deleted."""

    dry_run: bool
    objects: int
    stored_bytes: int
    live_images: int
    doomed: list[dict[str, Any]]
    doomed_bytes: int
    buried: int
    deleted: int = 0
    deleted_bytes: int = 0
    copied: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, snapshot: Snapshot, sweep: Sweep, *, dry_run: bool) -> CollectReport:
        """The report before anything is done."""
        return cls(
            dry_run=dry_run,
            objects=sum(map(len, snapshot.inside.values())) + len(snapshot.packs),
            stored_bytes=snapshot.stored_bytes,
            live_images=len(snapshot.holders.live(snapshot.now)),
            doomed=[{"key": x.key, "bytes": x.size, "why": x.why} for x in sweep.doomed],
            doomed_bytes=sweep.doomed_bytes,
            buried=len(sweep.tombstones),
        )

    def as_json(self) -> dict[str, Any]:
        """The object that `gc --json` prints."""
        return {name: getattr(self, name) for name in self.__slots__}
