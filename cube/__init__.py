"""Runs containers in microVMs whose root disks are block exports of the image cache.

It starts virtual machines, talks to the agent inside them, and reports what became of them. It must
never read, convert or cache an image itself: disks come as NBD exports from `preload.client`.
Whoever starts a machine owns its state: a private directory with its sockets, and a process that
does not outlive its owner; or the keeper of pods, whose machines outlive it and are adopted.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cube.orchestrator import Cube

__all__ = ["Cube"]


def __getattr__(name: str) -> Any:
    """`Cube`, imported when it is asked for: most commands need nothing of it."""
    if name == "Cube":
        return importlib.import_module("cube.orchestrator").Cube
    raise AttributeError(name)
