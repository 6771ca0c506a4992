"""`cubecache token`: a new token for the control API."""

from __future__ import annotations

import hashlib
import re
import secrets

import click

from imagecache.errors import UsageError
from imagecache.session import Session, json_option


@click.command(
    epilog="\b\nExamples:\n  cubecache token ci --role preload --owner team-a\n"
    "  cubecache token grafana --json"
)
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["read", "preload", "admin"]),
    default="read",
    show_default=True,
    help="What its bearer may do.",
)
@click.option("--owner", help="Its bearer sees only what this owner made; default: everything.")
@json_option
@click.pass_obj
def token(session: Session, *, name: str, role: str, owner: str | None) -> None:
    """Make a token, and print it with the lines to add to the file of [api] tokens.

    The daemon keeps its SHA-256 only and takes a changed file on SIGHUP.
    """
    for text in (name, owner or name):
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", text):
            raise UsageError(f"{text!r} is not up to 32 lower-case letters, digits and dashes")
    secret = secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    lines = f'[tokens.{name}]\nrole = "{role}"\nsha256 = "{digest}"\n'
    if owner:
        lines += f'owner = "{owner}"\n'
    session.terminal.answer({"token": secret, "toml": lines}, f"{secret}\n\n{lines}")
