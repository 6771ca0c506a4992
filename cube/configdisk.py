"""The guest's configuration disk: bytes that say what the machine runs. Pure.

Format: PROTOCOL.md, "Configuration disk". The guest's half is agent/config.c.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cube.container import ContainerSpec
from cube.guest.modules import SETS
from cube.records import field, number, text
from imagecache.errors import LimitExceeded, UsageError

MAGIC: Final = b"cubecfg1"
HEADER: Final = struct.Struct("<8sII")  # magic, body length, CRC-32 of the body
BODY_LIMIT: Final = 16 * 1024 * 1024
CONTAINER_LIMIT: Final = 32
MODULE_SET_LIMIT: Final = 16
SERIAL: Final = "cube-config"


class _Key(enum.IntEnum):
    HOSTNAME = 1
    CLOCK = 2
    RESOLV = 3
    HOSTS = 4
    CONTAINER = 5
    MODULES = 6


class _ContainerKey(enum.IntEnum):
    ID = 1
    NAME = 2
    ROOT_DISK = 3
    ROOT_FS = 4
    ROOT_WRITABLE = 5
    UPPER_BYTES = 6
    ARG = 7
    ENV = 8
    USER = 9
    WORKDIR = 10
    STDIN = 11
    CAPABILITIES = 12


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """What one machine runs. `clock_ns` is the host's time, ns since 1970, at the VM's start."""

    containers: Sequence[ContainerSpec]
    hostname: str = ""
    clock_ns: int = 0
    resolv_conf: bytes = b""  # empty: the image's own file stays
    hosts: bytes = b""
    modules: Sequence[str] = ()  # further sets of guest.modules.SETS, loaded before any program


def encode_config(config: GuestConfig) -> bytes:
    """The disk's bytes, a whole number of 4096-byte blocks; raises LimitExceeded, UsageError."""
    if not 0 < len(config.containers) <= CONTAINER_LIMIT:
        raise LimitExceeded(f"a machine runs 1 to {CONTAINER_LIMIT} containers")
    unknown = sorted(set(config.modules) - SETS.keys())
    if unknown or len(config.modules) > MODULE_SET_LIMIT:
        raise UsageError(
            f"module sets {', '.join(unknown)} do not exist"
            if unknown
            else f"more than {MODULE_SET_LIMIT} module sets",
            remedy=f"the sets are {', '.join(SETS)}",
        )
    body = text(_Key.HOSTNAME, config.hostname) if config.hostname else b""
    body += number(_Key.CLOCK, config.clock_ns)
    if config.resolv_conf:
        body += field(_Key.RESOLV, config.resolv_conf)
    if config.hosts:
        body += field(_Key.HOSTS, config.hosts)
    # Critical: a program whose modules are not there would fail in a way that nobody understands.
    body += b"".join(text(_Key.MODULES, name, critical=True) for name in config.modules)
    body += b"".join(
        field(_Key.CONTAINER, _encode_container(container), critical=True)
        for container in config.containers
    )
    if len(body) > BODY_LIMIT:
        raise LimitExceeded(
            f"the machine's configuration has {len(body)} bytes, over {BODY_LIMIT}",
            remedy="shorten arguments and environment",
        )
    disk = HEADER.pack(MAGIC, len(body), zlib.crc32(body)) + body
    return disk + bytes(-len(disk) % 4096)


def _encode_container(container: ContainerSpec) -> bytes:
    parts = [
        number(_ContainerKey.ID, container.id),
        text(_ContainerKey.NAME, container.name),
        text(_ContainerKey.ROOT_DISK, container.root_disk),
        text(_ContainerKey.ROOT_FS, container.root_fs),
        number(_ContainerKey.ROOT_WRITABLE, int(container.root_writable)),
        number(_ContainerKey.UPPER_BYTES, container.upper_bytes),
        text(_ContainerKey.USER, container.user),
        text(_ContainerKey.WORKDIR, container.working_directory),
        number(_ContainerKey.STDIN, int(container.wants_stdin)),
        number(_ContainerKey.CAPABILITIES, container.capabilities),
    ]
    parts += [text(_ContainerKey.ARG, argument) for argument in container.arguments]
    parts += [text(_ContainerKey.ENV, variable) for variable in container.environment]
    return b"".join(parts)
