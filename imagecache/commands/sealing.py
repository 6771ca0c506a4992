"""`cubecache secrets`: making, adding and choosing a realm's secrets. Nothing here talks to a store
but `status`."""

from __future__ import annotations

import asyncio
import os
import secrets as randomness
from pathlib import Path
from typing import Any

import click

from imagecache.blockimage.seals import SECRET_BYTES, Secrets
from imagecache.collect.repack import RepackReport
from imagecache.commands.repacking import tell
from imagecache.composition import opened_catalog, prepare_state_dir
from imagecache.errors import Denied, UsageError
from imagecache.realmsecrets import load_secrets
from imagecache.resealing import reseal as reseal_realm
from imagecache.sealedwith import count_key_ids
from imagecache.session import Session, json_option
from imagecache.terminal import size_text, table_text


@click.group("secrets")
def secrets() -> None:
    """Secrets that a sealed realm is encrypted with: make, add, choose, see what uses them.

    To rotate: `add` and bring the file to every host; then `use` the new one, again everywhere;
    what is new is sealed with it. `reseal` seals the rest; `status` says what needs which.
    """


@secrets.command(
    epilog="\b\nExamples:\n  cubecache secrets new /etc/cubecache/realm.secrets\n"
    "  CUBECACHE_ENCRYPTION_SECRETS=file:/etc/cubecache/realm.secrets cubecache preload IMAGE"
)
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@click.pass_obj
def new(session: Session, *, file: Path) -> None:
    """Make secrets for a new realm in FILE, which must not exist. Lost secrets are lost images."""
    made = Secrets(
        randomness.token_bytes(SECRET_BYTES), {1: randomness.token_bytes(SECRET_BYTES)}, 1
    )
    _write(file, made, replace=False)
    _tell(session, file, made, "made; keep a copy where the bucket is not")


@secrets.command(epilog="\b\nExamples:\n  cubecache secrets add /etc/cubecache/realm.secrets")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@click.pass_obj
def add(session: Session, *, file: Path) -> None:
    """Add one more secret to FILE, which opens and does not seal yet."""
    known = load_secrets(f"file:{file}", {})
    more = known.with_new(randomness.token_bytes(SECRET_BYTES), active=False)
    _write(file, more, replace=True)
    _tell(session, file, more, f"secret {max(more.by_id)} added: bring it to every host, then use")


@secrets.command(epilog="\b\nExamples:\n  cubecache secrets use /etc/cubecache/realm.secrets 2")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("key_id", metavar="ID", type=int)
@json_option
@click.pass_obj
def use(session: Session, *, file: Path, key_id: int) -> None:
    """Make ID the secret of FILE that seals what is new."""
    chosen = load_secrets(f"file:{file}", {}).using(key_id)
    _write(file, chosen, replace=True)
    _tell(session, file, chosen, f"secret {key_id} seals what is new")


@secrets.command(epilog="\b\nExamples:\n  cubecache secrets status")
@json_option
@click.pass_obj
def status(session: Session) -> None:
    """Count what of the realm is sealed with which secret. Reads every small object once."""

    async def count() -> tuple[int, dict[int, tuple[int, int]]]:
        async with opened_catalog(session.settings) as (_, catalog):
            return catalog.seals.active, await count_key_ids(catalog)

    active, counts = asyncio.run(count())
    rows = [("SECRET", "OBJECTS", "CHUNKS", "")]
    rows += [
        (str(key_id), str(objects), size_text(chunks), "active" if key_id == active else "")
        for key_id, (objects, chunks) in sorted(counts.items())
    ]
    answer: dict[str, Any] = {
        "active": active,
        "secrets": {
            str(key_id): {"objects": objects, "chunk_bytes": chunks}
            for key_id, (objects, chunks) in sorted(counts.items())
        },
    }
    session.terminal.answer(answer, table_text(rows))


@secrets.command(epilog="\b\nExamples:\n  cubecache secrets reseal")
@json_option
@click.pass_obj
def reseal(session: Session) -> None:
    """Seal the whole realm with the secret in use, so that older ones can be forgotten.

    Copies every chunk that an older secret seals; nobody should preload meanwhile. What collections
    have still to delete keeps its old secret: forget one when `status` does not name it any more.
    """
    settings = session.settings

    async def work() -> RepackReport:
        await asyncio.to_thread(prepare_state_dir, settings)
        async with opened_catalog(settings) as (opened, catalog):
            return await reseal_realm(catalog, opened.reader, scratch=settings.state_dir / "repack")

    tell(session, asyncio.run(work()))


def _tell(session: Session, file: Path, made: Secrets, what: str) -> None:
    answer = {"file": str(file), "ids": sorted(made.by_id), "active": made.active}
    session.terminal.answer(answer, f"{file}: {what}")


def _write(file: Path, made: Secrets, *, replace: bool) -> None:
    """Durable, readable by its owner alone, whole or not at all."""
    target = file.with_name(f".{file.name}.{randomness.token_hex(8)}")
    try:
        if not replace and file.exists():
            raise UsageError(f"{file} exists", remedy="secrets add FILE, or another name")
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(made.text())
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            target.replace(file)
        else:
            os.link(target, file)
            target.unlink()
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise Denied(f"{file} cannot be written: {error.strerror}") from error
