"""The guest's configuration disk: bytes that say what the machine runs. Pure.

Format: PROTOCOL.md, "Configuration disk". The guest's half is agent/config.c.
"""

from __future__ import annotations

import enum
import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cube.container import ContainerSpec
from cube.guest.modules import SETS
from cube.records import field, number, text
from cube.volumes import Interface, Mount, Volume, VolumeFile
from imagecache.errors import LimitExceeded, UsageError

MAGIC: Final = b"cubecfg1"
HEADER: Final = struct.Struct("<8sII")  # magic, body length, CRC-32 of the body
BODY_LIMIT: Final = 16 * 1024 * 1024
CONTAINER_LIMIT: Final = 32
MODULE_SET_LIMIT: Final = 16
SERIAL: Final = "cube-config"
SYNC_KEY_BYTES: Final = 16
INTERFACE_LIMIT: Final = 8
VOLUME_LIMIT: Final = 64
MOUNT_LIMIT: Final = 64  # of one container
FILE_LIMIT: Final = 4096  # of one volume


class _Key(enum.IntEnum):
    HOSTNAME = 1
    CLOCK = 2
    RESOLV = 3
    HOSTS = 4
    CONTAINER = 5
    MODULES = 6
    INTERFACE = 7
    VOLUME = 8
    TOOLS_DISK = 9
    SYNC_KEY = 10


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
    PID_ONE = 13
    MOUNT = 14
    AUTOSTART = 15
    TTY = 16
    READ_ONLY_ROOT = 17
    CPU_MILLIS = 18
    MEMORY_BYTES = 19
    PIDS_LIMIT = 20
    GROUP = 21
    NO_NEW_PRIVILEGES = 22
    DISCARD_AFTER_MS = 23


class _VolumeKey(enum.IntEnum):
    NAME = 1
    KIND = 2
    SIZE_BYTES = 3
    DISK = 4
    FILE_SYSTEM = 5
    SOURCE = 6
    OPTIONS = 7
    SECRET = 8
    MODE = 9
    GID = 10
    READ_ONLY = 11
    FILE = 12


class _FileKey(enum.IntEnum):
    PATH = 1
    MODE = 2
    CONTENT = 3
    UID = 4
    GID = 5


class _MountKey(enum.IntEnum):
    VOLUME = 1
    PATH = 2
    SUB_PATH = 3
    READ_ONLY = 4


class _InterfaceKey(enum.IntEnum):
    MAC = 1
    NAME = 2
    ADDRESS = 3
    GATEWAY = 4
    GATEWAY6 = 5
    MTU = 6


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """What one machine runs. `clock_ns` is the host's time, ns since 1970, at the VM's start."""

    containers: Sequence[ContainerSpec]
    hostname: str = ""
    clock_ns: int = 0
    resolv_conf: bytes = b""  # empty: the image's own file stays
    hosts: bytes = b""
    modules: Sequence[str] = ()  # further sets of guest.modules.SETS, loaded before any program
    interfaces: Sequence[Interface] = ()
    volumes: Sequence[Volume] = ()
    tools_disk: str = ""  # serial of the disk with s3fs, "" without one
    sync_key: bytes = b""  # from new_sync_key: lets a later host take the channel over


def new_sync_key() -> bytes:
    """A random key whose first byte does not come again in it, so that a scan never steps back."""
    first, *rest = secrets.token_bytes(SYNC_KEY_BYTES)
    return bytes([first, *(byte if byte != first else first ^ 1 for byte in rest)])


def encode_config(config: GuestConfig) -> bytes:
    """The disk's bytes, a whole number of 4096-byte blocks; raises LimitExceeded, UsageError."""
    if not 0 < len(config.containers) <= CONTAINER_LIMIT:
        raise LimitExceeded(f"a machine runs 1 to {CONTAINER_LIMIT} containers")
    _check_counts(config)
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
        field(_Key.INTERFACE, _encode_interface(interface), critical=True)
        for interface in config.interfaces
    )
    body += b"".join(
        field(_Key.VOLUME, _encode_volume(volume), critical=True) for volume in config.volumes
    )
    if config.tools_disk:
        body += text(_Key.TOOLS_DISK, config.tools_disk)
    if config.sync_key:
        body += field(_Key.SYNC_KEY, config.sync_key)
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
    # What would be wrong without the agent's knowing it is critical; zero is what it does anyway.
    parts += [
        number(key, int(value), critical=True)
        for key, value in (
            (_ContainerKey.TTY, container.tty),
            (_ContainerKey.READ_ONLY_ROOT, container.read_only_root),
            (_ContainerKey.CPU_MILLIS, container.cpu_millis),
            (_ContainerKey.MEMORY_BYTES, container.memory_bytes),
            (_ContainerKey.PIDS_LIMIT, container.pids_limit),
            (_ContainerKey.NO_NEW_PRIVILEGES, container.no_new_privileges),
            (_ContainerKey.DISCARD_AFTER_MS, container.discard_after_ms),
        )
        if value
    ]
    if not container.autostart:
        parts.append(number(_ContainerKey.AUTOSTART, 0, critical=True))
    parts += [number(_ContainerKey.GROUP, group, critical=True) for group in container.groups]
    parts += [
        field(_ContainerKey.MOUNT, _encode_mount(mount), critical=True)
        for mount in container.mounts
    ]
    parts += [text(_ContainerKey.ARG, argument) for argument in container.arguments]
    parts += [text(_ContainerKey.ENV, variable) for variable in container.environment]
    return b"".join(parts)


def _encode_interface(interface: Interface) -> bytes:
    parts = [text(_InterfaceKey.MAC, interface.mac), text(_InterfaceKey.NAME, interface.name)]
    parts += [text(_InterfaceKey.ADDRESS, address) for address in interface.addresses]
    if interface.gateway:
        parts.append(text(_InterfaceKey.GATEWAY, interface.gateway))
    if interface.gateway6:
        parts.append(text(_InterfaceKey.GATEWAY6, interface.gateway6))
    parts.append(number(_InterfaceKey.MTU, interface.mtu))
    return b"".join(parts)


def _encode_mount(mount: Mount) -> bytes:
    return (
        text(_MountKey.VOLUME, mount.volume)
        + text(_MountKey.PATH, mount.path)
        + text(_MountKey.SUB_PATH, mount.sub_path)
        + number(_MountKey.READ_ONLY, int(mount.read_only))
    )


def _encode_volume(volume: Volume) -> bytes:
    parts = [
        text(_VolumeKey.NAME, volume.name),
        number(_VolumeKey.KIND, volume.kind, critical=True),
        number(_VolumeKey.SIZE_BYTES, volume.size_bytes),
        text(_VolumeKey.DISK, volume.disk),
        text(_VolumeKey.FILE_SYSTEM, volume.file_system),
        text(_VolumeKey.SOURCE, volume.source),
        text(_VolumeKey.OPTIONS, volume.options),
        field(_VolumeKey.SECRET, volume.secret),
        number(_VolumeKey.MODE, volume.mode),
        number(_VolumeKey.READ_ONLY, int(volume.read_only)),
    ]
    if volume.gid >= 0:
        parts.append(number(_VolumeKey.GID, volume.gid))
    parts += [field(_VolumeKey.FILE, _encode_file(file)) for file in volume.files]
    return b"".join(parts)


def _encode_file(file: VolumeFile) -> bytes:
    return (
        text(_FileKey.PATH, file.path)
        + number(_FileKey.MODE, file.mode)
        + field(_FileKey.CONTENT, file.content)
        + number(_FileKey.UID, file.uid)
        + number(_FileKey.GID, file.gid)
    )


def _check_counts(config: GuestConfig) -> None:
    counts = (
        ("interfaces", len(config.interfaces), INTERFACE_LIMIT),
        ("volumes", len(config.volumes), VOLUME_LIMIT),
        *((f"files in volume {v.name}", len(v.files), FILE_LIMIT) for v in config.volumes),
        *((f"mounts in container {c.name}", len(c.mounts), MOUNT_LIMIT) for c in config.containers),
    )
    for what, count, limit in counts:
        if count > limit:
            raise LimitExceeded(f"{count} {what} are over the limit of {limit}")
    names = {volume.name for volume in config.volumes}
    if len(names) < len(config.volumes):
        raise UsageError("two volumes have one name")
    for container in config.containers:
        for mount in container.mounts:
            if mount.volume not in names:
                raise UsageError(
                    f"container {container.name} mounts {mount.volume}, which is no volume"
                )
    if config.sync_key and len(config.sync_key) != SYNC_KEY_BYTES:
        raise UsageError(f"a sync key has {SYNC_KEY_BYTES} bytes")
