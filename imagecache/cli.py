"""The `cubecache` command: global options, commands from every package, errors to exit codes."""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import click

from imagecache import commands
from imagecache.errors import CubecacheError, UsageError, as_record, exit_code
from imagecache.session import Session
from imagecache.terminal import Terminal

_EXAMPLES = """
\b
Examples:
  cubecache preload docker.io/library/python:3.12-slim
  cubecache serve
  cubecache export docker.io/library/python:3.12-slim
  cubecache run docker.io/library/python:3.12-slim -- python3 -c 'print(1)'

\b
Exit codes: 0 done, 1 failed, 2 usage, 65 bad input, 66 not found, 69 unavailable,
73 no space, 74 corrupt, 75 busy, 77 denied, 78 unsupported here, 130 interrupted.
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXAMPLES)
@click.option(
    "--state-dir", type=click.Path(path_type=Path), metavar="DIR", help="State directory."
)
@click.option("--store", metavar="URL", help="file:///path or s3://bucket/prefix?endpoint=URL")
@click.option("--realm", metavar="NAME", help="The name-space inside which content is shared.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="A TOML file.")
@click.option("--json", "as_json", is_flag=True, help="Print answers as JSON on stdout.")
@click.option("-v", "--verbose", is_flag=True, help="Log more, on stderr.")
@click.version_option(version("cubecache"), prog_name="cubecache")
@click.pass_context
def root(
    context: click.Context,
    *,
    state_dir: Path | None,
    store: str | None,
    realm: str | None,
    config: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Image cache and lazy block devices: OCI images served over NBD to microVMs."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    context.obj = Session(config, state_dir, store, realm, Terminal(as_json))


def register(group: click.Group) -> None:
    """Adds this package's commands."""
    for command in commands.COMMANDS:
        group.add_command(command)


def main() -> int:
    """Runs the command line; the exit code is that of `imagecache.errors.EXIT_CODES`."""
    for entry in sorted(entry_points(group="cubecache.commands"), key=lambda item: item.name):
        entry.load()(root)
    if sys.stdout is None:  # closed before we began: what nobody reads goes nowhere
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        status = _run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of stdout is gone; nothing that we could still say would reach it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run() -> int:
    arguments = sys.argv[1:]
    as_json = "--json" in _own_arguments(arguments)
    if "_CUBECACHE_COMPLETE" in os.environ:
        root.main(prog_name="cubecache")
    try:
        # Not root.main(): that turns a closed stdout into exit code 1.
        with root.make_context("cubecache", arguments) as context:
            status = root.invoke(context)
        return status if isinstance(status, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        usage = UsageError(error.format_message())
        failed = getattr(error, "ctx", None)
        if failed is not None and not as_json:
            click.echo(failed.get_usage(), err=True)
        return _fail(usage, as_json=as_json)
    except CubecacheError as error:
        return _fail(error, as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        click.echo("cubecache: interrupted", err=True)
        return 130


def _own_arguments(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _fail(error: CubecacheError, *, as_json: bool) -> int:
    code = exit_code(error)
    if as_json:
        record: dict[str, Any] = as_record(error) | {"exit_code": code}
        click.echo(json.dumps({"error": record}))
    else:
        click.echo(f"cubecache: {error.message}", err=True)
        if error.remedy:
            click.echo(f"  remedy: {error.remedy}", err=True)
    return code
