"""What a device tells of its reads: batches of them, and each wait with its cause.

Profiles, metrics and `explain` all hang on this one hook; a recorder must not block or raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Cause(StrEnum):
    """Why a read had to wait; of several causes the one named first here is told."""

    COLD = "cold"  # nobody had asked for the chunk before: fetched from the store
    ROT = "rot"  # the local copy did not match its digest: fetched again
    LATE = "late"  # it was being fetched ahead, and had not arrived yet
    JOINED = "joined"  # another read was already waiting for it
    FIRST_USE = "first-use"  # it was here, and compared with its digest first
    COPY = "copy"  # it was here, and a private copy was asked for


ORDER = {cause: place for place, cause in enumerate(Cause)}


@dataclass(frozen=True, slots=True)
class Wait:
    """One read that was not answered from the map at once.

    `begin` is the loop's monotonic time, `offset` and `length` bytes of the disk, `chunks` how many
    had to be waited for; `error` says why it failed in the end.
    """

    begin: float
    seconds: float
    offset: int
    length: int
    chunks: int
    cause: Cause
    error: str | None


class ReadRecorder(Protocol):
    """Somebody who watches an export."""

    def reads(self, batch: Sequence[tuple[int, int, bool]]) -> None:
        """(offset, length, hit) of reads that were answered, in order; one call per batch."""
        ...

    def waited(self, wait: Wait) -> None:
        """A read waited, and is answered now or has failed."""
        ...
