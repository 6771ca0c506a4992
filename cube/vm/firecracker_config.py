"""What Firecracker is told of a machine. Pure: a spec goes in, requests come out.

Objects and fields from src/firecracker/swagger/firecracker.yaml of its repository (1.17.0-dev):
machine-config, boot-source, drives, network-interfaces, vsock, logger, metrics, actions. A drive
served over vhost-user has `socket` and neither `is_read_only`, `path_on_host` nor `rate_limiter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cube.channel.vsock import KERNEL_ARGUMENT
from cube.vm.bridge import socket_name
from cube.vm.qemu_command import COMMAND_LINE_LIMIT, check_size, disk_order
from cube.vm.seam import (
    MIB,
    Disk,
    FileDisk,
    MachineSpec,
    NbdDisk,
    Nic,
    Rates,
    TapNic,
    VhostUserDisk,
)
from imagecache.errors import LimitExceeded, Unsupported

CPUS_MAXIMUM: Final = 32
SLOTS: Final = 19  # interrupts that devices can have: GSI 5 to 23
GUEST_CID: Final = 3  # the least; each machine has a device of its own, so numbers may be the same
VSOCK_NAME: Final = "agent.sock"
LOG_NAME: Final = "log.pipe"
METRICS_NAME: Final = "metrics.pipe"
START: Final = {"action_type": "InstanceStart"}
CTRL_ALT_DEL: Final = {"action_type": "SendCtrlAltDel"}
_REFILL_MILLISECONDS: Final = 1000


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the API; `what` names its object to people."""

    path: str
    body: dict[str, object]
    what: str


@dataclass(frozen=True, slots=True)
class BootFiles:
    """Where Firecracker finds kernel and initramfs: in its jail, if it has one."""

    kernel: str
    initrd: str


def check_firecracker_spec(spec: MachineSpec) -> None:
    """Raises LimitExceeded, UsageError or Unsupported, naming what the machine cannot have."""
    check_size(spec, CPUS_MAXIMUM)
    devices = ["the agent's vsock", *(f"network card {nic.mac}" for nic in spec.nics)]
    devices += [f"disk {disk.serial}" for disk in spec.disks]
    if len(devices) > SLOTS:
        raise LimitExceeded(
            f"{devices[SLOTS]} does not fit: Firecracker has {SLOTS} slots, and {len(devices)} "
            "devices are asked for"
        )
    for nic in spec.nics:
        if not isinstance(nic, TapNic):
            raise Unsupported(
                f"network card {nic.mac} has a network of its own, and Firecracker has taps only",
                remedy="give it a tap interface, or use --driver qemu",
            )


def bridged_disks(spec: MachineSpec, *, jailed: bool) -> list[NbdDisk | FileDisk]:
    """The disks that need a qemu-storage-daemon, in their order: those over NBD; in a jail, which
    holds no disks, those in files too; and these also where one limit is for all together.
    """
    disks = [disk for disk in spec.disks if not isinstance(disk, VhostUserDisk)]
    over_nbd = any(isinstance(disk, NbdDisk) for disk in disks)
    limited = bool(spec.rates.disk_bytes or spec.rates.disk_operations)
    if jailed or (over_nbd and limited):
        return disks
    return [disk for disk in disks if isinstance(disk, NbdDisk)]


def kernel_words(spec: MachineSpec) -> str:
    """The guest kernel's command line. `reboot=k`: Firecracker ends when its guest resets."""
    words = [
        "console=ttyS0",
        "quiet",
        "panic=-1",
        "reboot=k",
        "i8042.noaux",
        "i8042.nomux",
        "i8042.dumbkbd",
        "cryptomgr.notests",
        "random.trust_cpu=on",
        KERNEL_ARGUMENT,
        disk_order(spec),
        *spec.kernel_arguments,
    ]
    line = " ".join(words)
    if len(line) > COMMAND_LINE_LIMIT:
        raise LimitExceeded(f"kernel command line of {len(line)} bytes is over its limit")
    return line


def requests(
    spec: MachineSpec, files: BootFiles, bridged: Sequence[Disk], *, metrics: bool = False
) -> list[Request]:
    """Every call before InstanceStart, in the order in which they are made."""
    made = [Request("/logger", {"log_path": LOG_NAME, "level": "Warning"}, "the log")]
    if metrics:
        made.append(Request("/metrics", {"metrics_path": METRICS_NAME}, "the metrics"))
    size = {"vcpu_count": spec.cpus, "mem_size_mib": spec.memory_bytes // MIB}
    made.append(Request("/machine-config", {**size}, "memory and processors"))
    source: dict[str, object] = {
        "kernel_image_path": files.kernel,
        "initrd_path": files.initrd,
        "boot_args": kernel_words(spec),
    }
    made.append(Request("/boot-source", source, "kernel and initramfs"))
    for index, disk in enumerate(spec.disks):
        body = _drive(f"disk{index}", disk, bridged, spec.rates)
        made.append(Request(f"/drives/disk{index}", body, f"disk {disk.serial}"))
    for index, nic in enumerate(spec.nics):
        body = _interface(f"net{index}", nic, spec.rates)
        made.append(Request(f"/network-interfaces/net{index}", body, f"network card {nic.mac}"))
    vsock: dict[str, object] = {"guest_cid": GUEST_CID, "uds_path": VSOCK_NAME}
    made.append(Request("/vsock", vsock, "the agent's channel"))
    return made


def _drive(identity: str, disk: Disk, bridged: Sequence[Disk], rates: Rates) -> dict[str, object]:
    # With an initramfs no drive is the root device.
    body: dict[str, object] = {"drive_id": identity, "is_root_device": False}
    if disk in bridged:
        return {**body, "socket": socket_name(bridged.index(disk))}
    if isinstance(disk, VhostUserDisk):
        return {**body, "socket": str(disk.socket)}
    if isinstance(disk, NbdDisk):
        raise Unsupported(
            f"disk {disk.serial} is served over NBD, which Firecracker does not speak"
        )
    body |= {"path_on_host": str(disk.path), "is_read_only": disk.read_only}
    if not disk.read_only:
        body["cache_type"] = "Writeback"  # the guest's flushes reach the disk
    limiter = _limiter(rates.disk_bytes, rates.disk_operations)
    return {**body, "rate_limiter": limiter} if limiter else body


def _interface(identity: str, nic: Nic, rates: Rates) -> dict[str, object]:
    name = nic.interface if isinstance(nic, TapNic) else ""
    body: dict[str, object] = {"iface_id": identity, "guest_mac": nic.mac, "host_dev_name": name}
    limiter = _limiter(rates.network_bytes, 0)
    return {**body, "rx_rate_limiter": limiter, "tx_rate_limiter": limiter} if limiter else body


def _limiter(bytes_: int, operations: int) -> dict[str, object]:
    """A second's worth of tokens, refilled within a second."""
    given = {"bandwidth": bytes_, "ops": operations}
    return {
        name: {"size": size, "refill_time": _REFILL_MILLISECONDS}
        for name, size in given.items()
        if size
    }
