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
        # Not `group.commands`: a group may import its commands when they are asked for.
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None, name
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


COMPLETE = {
    "bash": (
        'source "$1"; COMP_WORDS=(cubecache prel); COMP_CWORD=1; '
        '_cubecache_completion "$COMMAND" prel cubecache; printf "%s\\n" "${COMPREPLY[@]}"'
    ),
    # Outside an editor zsh has no completion system: its two entry points are stood in for.
    "zsh": (
        "compdef() { : }; _describe() { print -l -- ${(P)3} }; compadd() { print -l -- $@ }; "
        'words=(cubecache prel); CURRENT=2; source "$1"; _cubecache_completion'
    ),
    "fish": 'source $argv[1]; complete --do-complete "cubecache prel"',
}


@pytest.mark.parametrize("shell", sorted(COMPLETE))
def test_completion_scripts_complete_in_their_shells(shell: str, tmp_path: Path) -> None:
    """K: the real shell sources what `cubecache completion` prints, and completes a command."""
    script = tmp_path / "script"
    with script.open("wb") as output:
        subprocess.run([COMMAND, "completion", shell], stdout=output, check=True, timeout=120)
    plain = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    place = [str(script)] if shell == "fish" else ["shell", str(script)]
    environment = {
        **os.environ,
        "PATH": f"{COMMAND.parent}:{os.environ['PATH']}",
        "COMMAND": str(COMMAND),
        "HOME": str(tmp_path),
    }
    answer = subprocess.run(
        [shell, *plain, "-c", COMPLETE[shell], *place],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )
    assert re.search(r"^preload\b", answer.stdout, re.MULTILINE), answer
    assert "exports" not in answer.stdout.split("Pull")[0], answer


@pytest.mark.quick
def test_every_command_that_the_documents_name_exists() -> None:
    """In back quotes, or at the start of an indented line."""
    known = {path.removeprefix("cubecache ") for path, _ in every_command()}
    for name in ("README.md", "ARCHITECTURE.md", "SECURITY.md"):
        text = (COMMAND.parents[2] / name).read_text()
        words = set(re.findall(r"(?:`|^    )cubecache ([a-z]+)", text, re.MULTILINE))
        assert words <= known, (name, words - known)
