"""Where a realm's secrets come from: a file, the environment, or a command such as a KMS client."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from imagecache.blockimage.seals import MAX_DOCUMENT, Secrets
from imagecache.errors import Denied, Unavailable, UsageError

COMMAND_SECONDS = 30.0
FORMS = "file:/PATH, env:NAME or command:PROGRAM ARGUMENTS"


def load_secrets(source: str, environment: Mapping[str, str]) -> Secrets:
    """The secrets behind a setting's text. Blocking: a command may take 30 seconds.

    Raises UsageError, Denied (a file that others may read, a command that fails), Unavailable. No
    message repeats a secret.
    """
    kind, _, what = source.partition(":")
    if kind == "file" and what:
        return Secrets.parse(_from_file(Path(what)))
    if kind == "env" and what:
        if what not in environment:
            raise Denied(f"the environment has no {what} with the realm's secrets")
        return Secrets.parse(environment[what])
    if kind == "command" and what:
        return Secrets.parse(_from_command(what))
    raise UsageError("[encryption] secrets has no known form", remedy=FORMS)


def _from_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Denied(f"{path} with the realm's secrets is not a regular file")
            if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise Denied(
                    f"{path} with the realm's secrets is open to others", remedy=f"chmod 600 {path}"
                )
            return _text(file.read(MAX_DOCUMENT + 1))
    except OSError as error:
        raise Denied(
            f"{path} with the realm's secrets cannot be read: {error.strerror}",
            remedy="cubecache secrets new FILE",
        ) from error


def _from_command(line: str) -> str:
    try:
        arguments = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"the command of [encryption] secrets: {error}") from error
    if not arguments:
        raise UsageError("[encryption] secrets names no command", remedy=FORMS)
    program = arguments[0]
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(
            f"{program} gave no secrets within {COMMAND_SECONDS:g} seconds"
        ) from error
    except OSError as error:
        raise Denied(f"{program} cannot be run: {error.strerror}") from error
    if done.returncode:
        raise Denied(f"{program}, which gives the realm's secrets, failed ({done.returncode})")
    return _text(done.stdout)


def _text(raw: bytes) -> str:
    if len(raw) > MAX_DOCUMENT:
        raise UsageError(f"the realm's secrets are over {MAX_DOCUMENT} bytes")
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise UsageError("the realm's secrets are not ASCII text") from error
