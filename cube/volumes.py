"""What a pod's machine has beside its containers: volumes, where they are mounted, interfaces.

Records that `cube.configdisk` encodes; the guest's half is agent/volume.c and agent/network.c.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class VolumeKind(enum.IntEnum):
    """Where a volume's bytes are."""

    FILES = 1  # in the configuration; copied to a tmpfs
    MEMORY = 2  # a tmpfs
    DISK = 3  # a disk of the machine
    NFS = 4
    S3 = 5
    VIRTIOFS = 6


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """One file of a FILES volume; `path` is relative and never leaves the volume."""

    path: str
    mode: int
    content: bytes
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume, mounted once in the machine and bound into the containers that name it."""

    name: str
    kind: VolumeKind
    files: Sequence[VolumeFile] = ()  # FILES
    size_bytes: int = 0  # MEMORY: the tmpfs's limit; 0 = half of the memory
    disk: str = ""  # DISK: serial
    file_system: str = "ext4"  # DISK
    source: str = ""  # NFS "ADDRESS:/path"; S3 "bucket[:/prefix]"; VIRTIOFS tag
    options: str = ""  # NFS and S3: what their mount programs take after -o
    secret: bytes = b""  # S3: "ACCESS:SECRET"
    mode: int = 0o777  # of the root directory of MEMORY, FILES and empty DISK volumes
    gid: int = -1  # of the same directory, which then passes it on (set-group-ID)
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume's place in one container."""

    volume: str
    path: str
    sub_path: str = ""
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface, found by its hardware address."""

    mac: str
    name: str = "eth0"
    addresses: Sequence[str] = ()  # ADDRESS/PREFIX, IPv4 and IPv6
    gateway: str = ""
    gateway6: str = ""
    mtu: int = 0
