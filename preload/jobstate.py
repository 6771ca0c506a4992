"""One preload job: what was asked, where it stands, who is woken when that changes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from imagecache.composition import ImageRequest
from preload.jobtable import JobRow
from preload.pace import Pace


class JobState(StrEnum):
    """Where a job stands; the last three are ends."""

    QUEUED = "queued"
    PAUSED = "paused"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


_ENDS = (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(eq=False, slots=True)
class Job:
    """One image's preload; `version` rises with every change, `changed` wakes who watches."""

    identity: str
    request: ImageRequest
    owner: str = ""
    priority: int = 0
    pin_seconds: int = 0
    bytes_per_second: int = 0  # bound of its downloads; 0: none
    warm: str = ""  # brought into this host's cache once it is stored: hot, whole or nothing
    slot: int = 0  # while it runs: which of the builds at once
    state: JobState = JobState.QUEUED
    pace: Pace = field(default_factory=lambda: Pace(time.monotonic))
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    attempts: int = 0
    submitted: float = 0.0  # seconds since the epoch
    version: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    stop_as: JobState = JobState.CANCELLED
    readable: bool = False  # the image can be exported, though it is not stored yet

    def may_be_exported(self) -> None:
        """Tells watchers that the image can be exported from now on."""
        self.readable = True
        self.touch()

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in _ENDS

    def touch(self) -> None:
        """Marks a change and wakes every watcher."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()

    async def watch(self, seen: int, seconds: float) -> None:
        """Returns when the version is beyond `seen`, or after `seconds`."""
        if self.version > seen or self.ended:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.changed.wait()

    def as_json(self) -> dict[str, Any]:
        """What the API answers of a job."""
        return {
            "id": self.identity,
            "image": self.request.reference,
            "state": self.state.value,
            "owner": self.owner,
            "priority": self.priority,
            "pin_seconds": self.pin_seconds,
            "limit_bytes_per_second": self.bytes_per_second,
            "warm": self.warm,
            "submitted": self.submitted,
            "attempts": self.attempts,
            "version": self.version,
            "readable": self.readable,
            "progress": self.pace.as_json(),
            "result": self.result,
            "error": self.error,
        }

    def row(self) -> JobRow:
        """What the table keeps of it."""
        return JobRow(
            id=self.identity,
            reference=self.request.reference,
            platform=self.request.platform,
            face=self.request.face,
            owner=self.owner,
            priority=self.priority,
            pin_seconds=self.pin_seconds,
            bytes_per_second=self.bytes_per_second,
            warm=self.warm,
            state=self.state.value,
            attempts=self.attempts,
            submitted=self.submitted,
            result=self.result,
            error=self.error,
            related=list(self.request.related),
        )

    @classmethod
    def of(cls, row: JobRow) -> Job:
        """The job that a row keeps."""
        return cls(
            identity=row.id,
            request=ImageRequest(row.reference, row.platform, row.face, tuple(row.related or ())),
            owner=row.owner,
            priority=row.priority,
            pin_seconds=row.pin_seconds,
            bytes_per_second=row.bytes_per_second,
            warm=row.warm,
            state=JobState(row.state),
            attempts=row.attempts,
            submitted=row.submitted,
            result=row.result,
            error=row.error,
        )
