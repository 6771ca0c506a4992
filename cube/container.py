"""What a container runs: an image's own configuration with the caller's changes applied. Pure.

The rules are Docker's: a caller's command replaces the image's command, a caller's entrypoint also
drops the image's command, variables are overridden one by one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cube.volumes import Mount
from imagecache.errors import LimitExceeded, UsageError

DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STRING_LIMIT: Final = 65536  # arguments, or variables, of one container
STRING_BYTES: Final = 131072  # of one argument or variable: Linux's MAX_ARG_STRLEN
TOTAL_BYTES: Final = 8 * 1024 * 1024  # of all of them

# Capability numbers of linux/capability.h that containers get by custom: chown, dac_override,
# fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, mknod,
# audit_write, setfcap.
DEFAULT_CAPABILITIES: Final = sum(
    1 << bit for bit in (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
)
ALL_CAPABILITIES: Final = (1 << 64) - 1
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


@dataclass(frozen=True, slots=True)
class ImageDefaults:
    """The parts of an image's configuration that a run starts from."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    user: str = ""
    working_directory: str = ""


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the caller changes; None leaves the image's value."""

    command: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    working_directory: str | None = None


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container as the guest agent runs it."""

    arguments: tuple[str, ...]
    environment: tuple[str, ...]
    user: str
    working_directory: str
    id: int = 1
    name: str = "main"
    root_disk: str = "root-1"  # serial of the disk
    root_fs: str = "erofs"
    root_writable: bool = False
    upper_bytes: int = 0  # limit of the writable layer; 0 = half the guest's memory
    wants_stdin: bool = False
    capabilities: int = DEFAULT_CAPABILITIES
    mounts: Sequence[Mount] = ()
    autostart: bool = True  # False: the host says when (GuestLink.start)
    tty: bool = False
    read_only_root: bool = False
    cpu_millis: int = 0  # thousandths of a processor; 0 = no limit
    memory_bytes: int = 0  # 0 = no limit
    pids_limit: int = 0  # 0 = no limit
    groups: Sequence[int] = ()  # beside those that the image gives the user
    no_new_privileges: bool = False
    discard_after_ms: int = 0  # a full window drops output after this time; 0 = the program waits


def compose(defaults: ImageDefaults, overrides: Overrides, *, hostname: str) -> ContainerSpec:
    """The container to run; raises UsageError or LimitExceeded naming what cannot be run."""
    entrypoint, command = defaults.entrypoint, defaults.command
    if overrides.entrypoint is not None:
        entrypoint, command = tuple(part for part in overrides.entrypoint if part), ()
    if overrides.command:
        command = overrides.command
    arguments = (*entrypoint, *command)
    if not arguments or not arguments[0]:
        raise UsageError(
            "the image names no command to run", remedy="give one after --, such as -- /bin/sh"
        )
    variables = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname}
    for entry in defaults.environment:
        name, equals, value = entry.partition("=")
        if name and equals:  # others exist in images and mean nothing to execve
            variables[name] = value
    variables.update(overrides.environment)
    environment = tuple(f"{name}={value}" for name, value in variables.items())
    user = defaults.user if overrides.user is None else overrides.user
    directory = overrides.working_directory
    if directory is None:
        directory = defaults.working_directory
    if directory and not directory.startswith("/"):
        directory = f"/{directory}"
    _check("argument", arguments)
    _check("environment variable", environment)
    _check("user", (user,))
    _check("working directory", (directory,))
    return ContainerSpec(arguments, environment, user, directory)


def parse_environment(entries: Sequence[str], host: Mapping[str, str]) -> dict[str, str]:
    """NAME=VALUE entries of a command line; a bare NAME takes the host's value if it has one."""
    variables: dict[str, str] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name:
            raise UsageError(f"environment variable {entry!r} has no name", remedy="NAME=VALUE")
        if equals:
            variables[name] = value
        elif name in host:
            variables[name] = host[name]
    return variables


def check_hostname(hostname: str) -> str:
    """The name itself if it is a DNS name of at most 64 bytes, else UsageError."""
    if len(hostname) > 64 or not _HOSTNAME.fullmatch(hostname):
        raise UsageError(f"host name {hostname!r} is not a DNS name")
    return hostname


def _check(what: str, strings: Sequence[str]) -> None:
    if len(strings) > STRING_LIMIT:
        raise LimitExceeded(f"{len(strings)} {what}s are over the limit of {STRING_LIMIT}")
    total = 0
    for string in strings:
        raw = string.encode("utf-8", "surrogateescape")
        if b"\0" in raw:
            raise UsageError(f"the {what} {string[:40]!r} holds a NUL byte")
        if len(raw) >= STRING_BYTES:
            raise LimitExceeded(f"one {what} has {len(raw)} bytes, over {STRING_BYTES - 1}")
        total += len(raw)
    if total > TOTAL_BYTES:
        raise LimitExceeded(f"the {what}s have {total} bytes together, over {TOTAL_BYTES}")
