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
    from cube.keeper.logfile import LogQuery
    from cube.orchestrator import Cube

__all__ = ["Cube", "LogQuery"]

_HOMES = {"Cube": "cube.orchestrator", "LogQuery": "cube.keeper.logfile"}


def __getattr__(name: str) -> Any:
    """The library's names, imported when they are asked for: most commands need none of them."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(name)
