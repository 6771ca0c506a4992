"""Credentials as docker keeps them: `config.json`, and the helper programs it names.

Sources: docker CLI documentation (auths, credHelpers, credsStore), the docker-credential-helpers
protocol (`docker-credential-X get`: server on stdin, JSON on stdout). Secrets appear in no
repr, message or log.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imagecache.errors import Denied, LimitExceeded, Rejected, Unavailable
from imagecache.oci.descriptor import as_object
from imagecache.oci.reference import DOCKER_HUB
from imagecache.oci.strictjson import Json, parse_object

_CONFIG_LIMIT = 1 << 20
_HELPER_LIMIT = 1 << 20
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_HUB_KEY = "https://index.docker.io/v1/"
_NOT_FOUND = b"credentials not found"
_TOKEN_USER = "<token>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one registry may be told: a user's password, an identity token, or a bearer token."""

    username: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    def __repr__(self) -> str:
        return "Credentials(...)"

    def basic(self) -> str | None:
        """The Authorization value for Basic, or None where there is no password."""
        if not self.username or not self.password:
            return None
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")


def docker_config_path(environment: Mapping[str, str]) -> Path | None:
    """Where docker keeps its config.json, by DOCKER_CONFIG or HOME; for the composition root."""
    if directory := environment.get("DOCKER_CONFIG"):
        return Path(directory) / "config.json"
    if home := environment.get("HOME"):
        return Path(home) / ".docker" / "config.json"
    return None


async def find_credentials(
    host: str, config: Path | None, *, helper_path: str | None, helper_seconds: float
) -> Credentials | None:
    """The credentials for a reference's host, or None: credHelpers, credsStore, then auths.

    Raises `Rejected` for a broken config file, `Denied` or `Unavailable` for a broken helper.
    """
    if config is None:
        return None
    raw = await asyncio.to_thread(_read_config, config)
    if raw is None:
        return None
    what = f"docker config {config}"
    members = parse_object(raw, limit=_CONFIG_LIMIT, what=what)
    helpers = as_object(members.get("credHelpers") or {}, f"{what}: credHelpers")
    for key, name in helpers.items():
        if _host_of(key) == host:
            return await _ask_helper(name, key, helper_path, helper_seconds)
    store = members.get("credsStore")
    if store:
        server = _HUB_KEY if host == DOCKER_HUB else host
        found = await _ask_helper(store, server, helper_path, helper_seconds)
        if found is not None:
            return found
    auths = as_object(members.get("auths") or {}, f"{what}: auths")
    for key, entry in auths.items():
        if _host_of(key) == host:
            return _from_entry(as_object(entry, f"{what}: auths"), what)
    return None


def _read_config(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            raw = file.read(_CONFIG_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Denied(f"cannot read docker config {path}: {error.strerror}") from None
    if len(raw) > _CONFIG_LIMIT:
        raise LimitExceeded(f"docker config {path} has more than {_CONFIG_LIMIT} bytes")
    return raw


def _host_of(key: str) -> str:
    """The host that a key of the config means: `https://index.docker.io/v1/` is docker.io."""
    host = key.partition("://")[2] or key
    host = host.partition("/")[0].lower()
    return DOCKER_HUB if host in {"index.docker.io", "registry-1.docker.io"} else host


def _from_entry(entry: dict[str, Json], what: str) -> Credentials | None:
    def word(key: str) -> str:
        found = entry.get(key)
        if found is None:
            return ""
        if not isinstance(found, str):
            raise Rejected(f"{what}: auths: {key} is not a string")
        return found

    username, password = word("username"), word("password")
    packed = word("auth")
    if packed:
        try:
            unpacked = base64.b64decode(packed, validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            raise Rejected(f"{what}: auths: auth is not base64") from None
        username, colon, password = unpacked.rstrip("\x00").partition(":")
        if not colon:
            raise Rejected(f"{what}: auths: auth is not user:password")
    found = Credentials(username, password, word("identitytoken"), word("registrytoken"))
    return found if found != Credentials() and found != Credentials(username) else None


async def _ask_helper(
    name: Json, server: str, helper_path: str | None, seconds: float
) -> Credentials | None:
    if not isinstance(name, str) or not _HELPER_NAME.match(name):
        raise Rejected("docker config names a credential helper that is not a plain name")
    program = f"docker-credential-{name}"
    found = await asyncio.to_thread(shutil.which, program, path=helper_path)
    if found is None:
        raise Denied(f"credential helper {program} is not installed", remedy="install it")
    try:
        process = await asyncio.create_subprocess_exec(
            found,
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            limit=_HELPER_LIMIT + 1,
        )
    except OSError as error:
        raise Denied(f"cannot run {program}: {error.strerror}") from None
    try:
        async with asyncio.timeout(seconds):
            answer = await _converse(process, server, program)
            code = await process.wait()
    except TimeoutError:
        raise Unavailable(f"{program} did not answer within {seconds:g} s") from None
    finally:
        # The whole session goes: a helper may have left children that hold our pipe.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if code != 0:
        if _NOT_FOUND in answer.lower():
            return None
        raise Denied(f"{program} failed with exit code {code}")
    members = parse_object(answer, limit=_HELPER_LIMIT, what=f"the answer of {program}")
    username, secret = members.get("Username"), members.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str):
        raise Rejected(f"the answer of {program} has no Username and Secret")
    if username == _TOKEN_USER:
        return Credentials(identity_token=secret)
    return Credentials(username, secret)


async def _converse(process: asyncio.subprocess.Process, server: str, program: str) -> bytes:
    """Send the server's name, read the whole answer, capped."""
    if process.stdin is None or process.stdout is None:
        raise Unavailable(f"{program} has no pipes")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(server.encode() + b"\n")
        await process.stdin.drain()
    process.stdin.close()
    answer = bytearray()
    while piece := await process.stdout.read(65536):
        answer += piece
        if len(answer) > _HELPER_LIMIT:
            raise LimitExceeded(f"{program} answered more than {_HELPER_LIMIT} bytes")
    return bytes(answer)
