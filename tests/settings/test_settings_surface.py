"""The surface of the command line: exit codes, examples, completion."""

import os
import re
import subprocess
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from imagecache.cli import root
from imagecache.errors import EXIT_CODES, CubecacheError, exit_code

COMMAND = Path(__file__).parents[2] / ".venv/bin/cubecache"


def every_command() -> list[tuple[str, click.Command]]:
    for entry in entry_points(group="cubecache.commands"):
        entry.load()(root)
    found: list[tuple[str, click.Command]] = []

    def walk(path: str, group: click.Group) -> None:
        for name, command in sorted(group.commands.items()):
            found.append((f"{path} {name}", command))
            if isinstance(command, click.Group):
                walk(f"{path} {name}", command)

    walk("cubecache", root)
    return found


@pytest.mark.quick
def test_help_has_the_one_table_of_exit_codes() -> None:
    """Every code of `EXIT_CODES` is in `cubecache --help`, and no other but 0 and 130."""
    text = " ".join((root.epilog or "").split())
    listed = text.partition("Exit codes: ")[2].rstrip(".")
    codes = {int(part.split()[0]) for part in listed.split(", ")}
    assert codes == {code for _, code in EXIT_CODES} | {0, 130}
    for kind, code in EXIT_CODES:
        if issubclass(kind, CubecacheError):
            assert exit_code(kind("x")) == code
    assert exit_code(ValueError("x")) == 70


@pytest.mark.quick
def test_every_command_has_examples_that_name_it() -> None:
    for path, command in every_command():
        if isinstance(command, click.Group) and not command.invoke_without_command:
            continue
        assert "Examples:" in (command.epilog or ""), path
        name = path.removeprefix("cubecache ")  # global options may stand between
        assert re.search(rf"cubecache.* {name}\b", command.epilog or ""), path
        assert (command.help or "").strip(), path


def test_completion_scripts_complete() -> None:
    """Each shell's script parses where the shell is here; bash really completes a command."""
    for shell in ("bash", "zsh", "fish"):
        script = subprocess.run(
            [COMMAND, "completion", shell], capture_output=True, text=True, check=True
        ).stdout
        assert "_CUBECACHE_COMPLETE" in script
        if shell == "bash":
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    words = {"COMP_WORDS": "cubecache prel", "COMP_CWORD": "1"}
    environment = {**os.environ, **words, "_CUBECACHE_COMPLETE": "bash_complete"}
    answer = subprocess.run([COMMAND], capture_output=True, text=True, env=environment, check=False)
    assert re.search(r"\bpreload\b", answer.stdout), answer
