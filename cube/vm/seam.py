"""The seam between cube and its virtual machine drivers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

SERIAL_LIMIT: Final = 20  # bytes of a virtio block device's serial
MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class NbdDisk:
    """A disk served over NBD on a unix socket. `serial` is the guest's name for it."""

    serial: str
    socket: Path
    export: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class FileDisk:
    """A disk in a raw file."""

    serial: str
    path: Path
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class VhostUserDisk:
    """A disk that another process (SPDK, qemu-storage-daemon) serves as vhost-user-blk on a unix
    socket; that process says whether it can be written. It needs the guest's memory to be shared.
    """

    serial: str
    socket: Path
    read_only: bool = True


Disk = NbdDisk | FileDisk | VhostUserDisk


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of the host that leads to one of the guest."""

    host_ip: str
    host_port: int
    guest_port: int
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True)
class UserNic:
    """A network card on a network of its own, behind the host's address; needs no privilege."""

    mac: str
    forwards: Sequence[Forward] = ()


@dataclass(frozen=True, slots=True)
class TapNic:
    """A network card on a tap interface that exists."""

    mac: str
    interface: str


Nic = UserNic | TapNic


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine may do a second; 0 = no limit. Disks all together, but for those whose
    server is not ours (VhostUserDisk); each network card by itself and in each direction.
    """

    disk_bytes: int = 0
    disk_operations: int = 0
    network_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine to start. `directory` is private to it and exists; its sockets go there."""

    name: str
    kernel: Path
    initrd: Path
    disks: Sequence[Disk]
    directory: Path
    memory_bytes: int = 256 * MIB
    cpus: int = 1
    tsc_khz: int = 0  # the host's time-stamp counter, 0 if unknown
    kernel_arguments: Sequence[str] = ()
    dies_with_owner: bool = True
    nics: Sequence[Nic] = ()
    rates: Rates = Rates()


class Machine(Protocol):
    """A started machine. `channel` is the byte channel to its agent, connected."""

    @property
    def reader(self) -> asyncio.StreamReader: ...

    @property
    def writer(self) -> asyncio.StreamWriter: ...

    @property
    def process_id(self) -> int:
        """The host's process that is the machine."""

    async def wait(self) -> int:
        """The exit status of the machine's process, when it has ended."""

    async def stop(self) -> None:
        """Ends the machine at once, and returns when process and sockets are gone. Idempotent."""

    def last_words(self) -> list[str]:
        """The last lines of the emulator's output and the guest's console, made printable."""


class Driver(Protocol):
    """Starts machines."""

    @property
    def name(self) -> str: ...

    async def describe(self) -> dict[str, str]:
        """What this host offers, for `doctor`: machine type, accelerator, emulator's version."""

    async def start(self, spec: MachineSpec) -> Machine:
        """A running machine; raises MachineFailed, Unsupported, LimitExceeded, NotFound."""

    async def adopt(self, process_id: int, started: int, directory: Path) -> Machine:
        """A machine that an earlier process of ours started (see `cube.vm.adopted`)."""
