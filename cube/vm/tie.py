"""Words before a command that end its process together with ours, whatever ends us."""

from __future__ import annotations

import os
from typing import Final

# setpriv ties the process to its parent's life; the shell closes the gap in which the parent has
# died already, when the tie would never act.
_TIED: Final = (
    *("setpriv", "--pdeathsig", "KILL", "sh", "-c"),
    'owner=$1; shift; [ "$PPID" = "$owner" ] && exec "$@"',
    "cubecache-vm",
)


def tie(*, dies_with_owner: bool) -> tuple[str, ...]:
    """The words; none where the process is to outlive us."""
    return (*_TIED, str(os.getpid())) if dies_with_owner else ()
