"""The command line of a QEMU machine. Pure: a spec goes in, words come out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cube.vm.seam import (
    MIB,
    SERIAL_LIMIT,
    FileDisk,
    MachineSpec,
    NbdDisk,
    Nic,
    Rates,
    TapNic,
    VhostUserDisk,
)
from imagecache.errors import LimitExceeded, Unsupported, UsageError

MICROVM_SLOTS: Final = 24  # virtio-mmio transports of a microvm; the 25th device has no place
PCI_SLOTS: Final = 28  # free ones on the root bus of q35 and virt
MEMORY_MINIMUM: Final = 96 * MIB  # below it the kernel has no room for its initramfs
MEMORY_MAXIMUM: Final = 1024 * 1024 * MIB
CPUS_MAXIMUM: Final = 64
COMMAND_LINE_LIMIT: Final = 2047  # bytes the x86 boot protocol of older kernels takes
RECONNECT_SECONDS: Final = 60  # how long a disk waits for its server before reads fail
AGENT_PORT: Final = "cubecache.agent"
_GROUP: Final = "rates"


@dataclass(frozen=True, slots=True)
class Platform:
    """What one host boots with: emulator, machine type (microvm, q35, virt), accelerator."""

    program: Path
    machine: str
    accelerator: str

    @property
    def mmio(self) -> bool:
        """Whether devices sit on virtio-mmio instead of PCI."""
        return self.machine == "microvm"


def kernel_command_line(platform: Platform, spec: MachineSpec) -> str:
    """The guest kernel's command line. Never acpi=off: a microvm finds its devices by ACPI."""
    console = "ttyAMA0" if platform.machine == "virt" else "ttyS0"
    words = [
        f"console={console}",
        "quiet",
        "panic=-1",  # reboot at once, which ends the machine
        "cryptomgr.notests",  # a quarter second of an emulated boot
        "random.trust_cpu=on",
    ]
    if platform.mmio:
        words.append("no_timer_check")
        if platform.accelerator == "tcg" and spec.tsc_khz:
            # An emulated microvm has neither HPET nor PM timer. Where the kernel's calibration
            # against the PIT fails (a busy host), it hangs; so it is told the rate.
            words.append(f"tsc_early_khz={spec.tsc_khz}")
    if shares_memory(spec):
        # A vhost-user disk has no serial of our choice, so all are known by their order.
        words.append(disk_order(spec))
    words += spec.kernel_arguments
    line = " ".join(words)
    if len(line) > COMMAND_LINE_LIMIT:
        raise LimitExceeded(f"kernel command line of {len(line)} bytes is over its limit")
    return line


def disk_order(spec: MachineSpec) -> str:
    """The word of the kernel's command line that tells the agent its disks, in their order."""
    return "cube.disks=" + ",".join(disk.serial for disk in spec.disks)


def shares_memory(spec: MachineSpec) -> bool:
    """Whether another process works in the guest's memory."""
    return any(isinstance(disk, VhostUserDisk) for disk in spec.disks)


def check_spec(platform: Platform, spec: MachineSpec) -> None:
    """Raises LimitExceeded, UsageError or Unsupported, naming what the machine cannot have."""
    if spec.rates.network_bytes:
        raise Unsupported(
            "QEMU does not limit the rate of network cards", remedy="limit the tap with tc"
        )
    check_size(spec, CPUS_MAXIMUM)
    slots = MICROVM_SLOTS if platform.mmio else PCI_SLOTS
    devices = ["the agent's serial port", *(f"network card {nic.mac}" for nic in spec.nics)]
    devices += [f"disk {disk.serial}" for disk in spec.disks]
    if len(devices) > slots:
        raise LimitExceeded(
            f"{devices[slots]} does not fit: a {platform.machine} machine has {slots} slots, and "
            f"{len(devices)} devices are asked for"
        )


def check_size(spec: MachineSpec, cpus_maximum: int) -> None:
    """Raises LimitExceeded for memory and processors, UsageError for serials."""
    if not MEMORY_MINIMUM <= spec.memory_bytes <= MEMORY_MAXIMUM:
        raise LimitExceeded(
            f"{spec.memory_bytes // MIB} MiB of memory: a machine has "
            f"{MEMORY_MINIMUM // MIB} MiB to {MEMORY_MAXIMUM // MIB} MiB"
        )
    if not 1 <= spec.cpus <= cpus_maximum:
        raise LimitExceeded(f"{spec.cpus} processors: a machine has 1 to {cpus_maximum}")
    serials = [disk.serial for disk in spec.disks]
    for serial in serials:
        if not 0 < len(serial.encode()) <= SERIAL_LIMIT or serials.count(serial) > 1:
            raise UsageError(f"disk serial {serial!r} is empty, too long or used twice")


def command(
    platform: Platform, spec: MachineSpec, *, channel_fd: int, console_fd: int
) -> list[str]:
    """The words that start QEMU. The two descriptors are inherited: a listening socket for the
    agent's channel, a connected one for the guest's console.
    """
    machine = platform.machine
    if machine == "microvm":
        machine = "microvm,pit=on,pic=on,rtc=on,isa-serial=on"
    accelerator = "tcg,thread=multi" if platform.accelerator == "tcg" else platform.accelerator
    words = [
        str(platform.program),
        *("-name", f"cubecache-{spec.name},process=cubecache-vm"),
        *("-machine", machine, "-accel", accelerator, "-cpu", "max"),
        *("-smp", str(spec.cpus), "-m", f"{spec.memory_bytes // MIB}M"),
        *("-kernel", str(spec.kernel), "-initrd", str(spec.initrd)),
        *("-append", kernel_command_line(platform, spec)),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=agent,fd={channel_fd},server=on,wait=off"),
    ]
    suffix = "device" if platform.mmio else "pci"
    words += ["-device", f"virtio-serial-{suffix},max_ports=4"]
    words += ["-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
    for index, nic in enumerate(spec.nics):
        words += _network(f"net{index}", nic, suffix)
    if shares_memory(spec):
        size = f"{spec.memory_bytes // MIB}M"
        words += ["-object", f"memory-backend-memfd,id=memory,size={size},share=on"]
        words += ["-machine", "memory-backend=memory"]
        if platform.mmio:
            # Servers of vhost-user speak virtio 1, a microvm's slots by default what was before it.
            words += ["-global", "virtio-mmio.force-legacy=false"]
    words += throttle_words(spec.rates)
    for index, disk in enumerate(spec.disks):
        if isinstance(disk, VhostUserDisk):
            path = str(disk.socket).replace(",", ",,")
            words += ["-chardev", f"socket,id=disk{index},path={path},reconnect=1"]
            device = {"driver": "vhost-user-blk", "chardev": f"disk{index}"}
            if suffix == "pci":
                device["driver"] = "vhost-user-blk-pci"
        else:
            words += ["-blockdev", json.dumps(disk_node(index, disk, spec.rates))]
            device = {
                "driver": f"virtio-blk-{suffix}",
                "drive": f"disk{index}",
                "serial": disk.serial,
            }
        words += ["-device", json.dumps(device)]
    return words


def _network(identity: str, nic: Nic, suffix: str) -> list[str]:
    if isinstance(nic, TapNic):
        backend = f"tap,id={identity},ifname={nic.interface},script=no,downscript=no"
    else:
        backend = f"user,id={identity},ipv6=off"
        for one in nic.forwards:
            host = f"{one.protocol}:{one.host_ip}:{one.host_port}"
            backend += f",hostfwd={host}-:{one.guest_port}"
    device = {"driver": f"virtio-net-{suffix}", "netdev": identity, "mac": nic.mac}
    if suffix == "pci":
        device["romfile"] = ""  # nobody boots from the network
    return ["-netdev", backend, "-device", json.dumps(device)]


def throttle_words(rates: Rates) -> list[str]:
    """The group that a machine's disks share, where they are limited."""
    limits = {"bps-total": rates.disk_bytes, "iops-total": rates.disk_operations}
    given = {name: value for name, value in limits.items() if value}
    if not given:
        return []
    group = {"qom-type": "throttle-group", "id": _GROUP, "limits": given}
    return ["-object", json.dumps(group)]


def disk_node(index: int, disk: NbdDisk | FileDisk, rates: Rates) -> dict[str, object]:
    """A disk as QEMU's block layer takes it, named `diskINDEX`; throttled where that is asked."""
    if not (rates.disk_bytes or rates.disk_operations):
        return _block_node(f"disk{index}", disk)
    # The name goes to the outer node, which is what the device names.
    return {
        "driver": "throttle",
        "node-name": f"disk{index}",
        "read-only": disk.read_only,
        "throttle-group": _GROUP,
        "file": _block_node(f"below{index}", disk),
    }


def _block_node(node: str, disk: NbdDisk | FileDisk) -> dict[str, object]:
    if isinstance(disk, NbdDisk):
        return {
            "driver": "nbd",
            "node-name": node,
            "read-only": disk.read_only,
            "export": disk.export,
            "server": {"type": "unix", "path": str(disk.socket)},
            "reconnect-delay": RECONNECT_SECONDS,
        }
    return {
        "driver": "raw",
        "node-name": node,
        "read-only": disk.read_only,
        "file": {
            "driver": "file",
            "filename": str(disk.path),
            "read-only": disk.read_only,
            "locking": "off" if disk.read_only else "auto",
        },
    }


def kvm_flags(cpuinfo: str) -> bool:
    """Whether /proc/cpuinfo shows hardware virtualisation (x86; elsewhere flags say nothing)."""
    flags: Sequence[str] = ()
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            flags = line.partition(":")[2].split()
            break
    return not flags or "vmx" in flags or "svm" in flags
