"""Errors of machines: more exact types of `imagecache.errors`, with the machine's last words."""

from __future__ import annotations

from collections.abc import Sequence

from imagecache.errors import Unavailable

_SHOWN_LINES = 15


class MachineFailed(Unavailable):
    """A microVM did not boot, crashed, or stopped answering.

    `console` holds the last lines of the guest's console and of the emulator's own output.
    """

    def __init__(
        self, message: str, *, console: Sequence[str] = (), remedy: str | None = None
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.console = tuple(console)

    def __str__(self) -> str:
        if not self.console:
            return super().__str__()
        lines = "\n".join(f"  | {line}" for line in self.console[-_SHOWN_LINES:])
        return f"{super().__str__()}\n{lines}"


class BootFailed(MachineFailed):
    """The machine never reached the point where a container could start."""


class Overdue(MachineFailed):
    """The machine was stopped because its time was up."""
