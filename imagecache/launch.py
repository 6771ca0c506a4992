"""The entry point of `cubecache`: until the imports are done, Ctrl-C just ends the process."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Half a second of imports; an interrupt in them would be a traceback from nowhere (K3).
    from imagecache import cli  # noqa: PLC0415

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main())
