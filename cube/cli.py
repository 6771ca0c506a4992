"""cube's commands: `mount`, `umount`, `run`."""

from __future__ import annotations

import click

from cube.mounting import mount, umount


def register(group: click.Group) -> None:
    """Adds this package's commands."""
    for command in (mount, umount):
        group.add_command(command)
