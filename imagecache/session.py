"""One command's context: the global options, settings read when needed, and its terminal."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from imagecache.facechoice import FaceChoice
from imagecache.settings import Settings, load_settings, parse_size
from imagecache.terminal import Terminal

__all__ = [
    "Session",
    "Settings",
    "face_option",
    "fill_option",
    "json_option",
    "platform_option",
]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Session:
    """What every command is given as click's context object."""

    config: Path | None = None
    state_dir: Path | None = None
    store: str | None = None
    realm: str | None = None
    terminal: Terminal = field(default_factory=Terminal)
    _settings: Settings | None = None

    @property
    def settings(self) -> Settings:
        """The settings; read once, when first asked for."""
        if self._settings is None:
            self._settings = self.read_settings()
        return self._settings

    def read_settings(self) -> Settings:
        """The settings as file, environment and flags have them now."""
        return load_settings(
            os.environ,
            config=self.config,
            state_dir=self.state_dir,
            store=self.store,
            realm=self.realm,
        )


def json_option(command: F) -> F:
    """Adds `--json` to a command; it means the same as before the command."""

    @click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON on stdout.")
    @click.pass_context
    @functools.wraps(command)
    def wrapped(context: click.Context, /, *args: Any, as_json: bool, **kwargs: Any) -> Any:
        session: Session = context.obj
        session.terminal.json = session.terminal.json or as_json
        return context.invoke(command, *args, **kwargs)

    return wrapped  # type: ignore[return-value]  # the wrapper keeps the command's shape


def platform_option(command: F) -> F:
    """Adds `--platform`."""
    option = click.option(
        "--platform", metavar="OS/ARCH", help="Of a multi-platform image; default: this host's."
    )
    return option(command)


def face_option(command: F) -> F:
    """Adds `--fs` and `--free`; the command is given `face`, a `FaceChoice`'s text."""

    @click.option(
        "--fs",
        type=click.Choice(["erofs", "ext4"]),
        default="erofs",
        show_default=True,
        help="The file system of the block image.",
    )
    @click.option("--free", metavar="SIZE", help="Room for writing on an ext4 disk, as in 4GiB.")
    @functools.wraps(command)
    def wrapped(*args: Any, fs: str, free: str | None, **kwargs: Any) -> Any:
        room = parse_size(free, "--free") if free else 0
        choice = FaceChoice.parse(f"{fs}:free={room}" if room else fs)
        return command(*args, face=str(choice), **kwargs)

    return wrapped  # type: ignore[return-value]  # the wrapper keeps the command's shape


def fill_option(command: F) -> F:
    """Adds `--fill`."""
    option = click.option(
        "--fill",
        type=click.Choice(["whole", "hot", "none"]),
        help="How much to fetch in the background; default: whole where it fits the cache.",
    )
    return option(command)


def record_option(command: F) -> F:
    """Adds `--record`."""
    option = click.option(
        "--record", is_flag=True, help="Record what the start reads: `cubecache profile`."
    )
    return option(command)
