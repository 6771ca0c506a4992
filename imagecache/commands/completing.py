"""`cubecache completion`: the script that a shell needs to complete our commands."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from imagecache.errors import Unsupported

_PLACES = {
    "bash": "cubecache completion bash > /etc/bash_completion.d/cubecache",
    "zsh": 'cubecache completion zsh > "${fpath[1]}/_cubecache"',
    "fish": "cubecache completion fish > ~/.config/fish/completions/cubecache.fish",
}


@click.command(epilog="\b\nExamples:\n" + "\n".join(f"  {line}" for line in _PLACES.values()))
@click.argument("shell", type=click.Choice(list(_PLACES)))
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print the completion script of a shell."""
    kind = get_completion_class(shell)
    if kind is None:
        raise Unsupported(f"no completion for {shell}")
    root = context.find_root().command
    made = kind(root, {}, "cubecache", "_CUBECACHE_COMPLETE")
    # Not `source()`: for bash that would start a bash to look at its version.
    click.echo(made.source_template % made.source_vars())
