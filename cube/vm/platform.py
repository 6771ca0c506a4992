"""Finds out what machines boot on this host, by booting one, and remembers the answer."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cube.errors import BootFailed
from cube.guest.assets import GuestFiles
from cube.vm.qemu import QemuDriver, emulator, emulator_version
from cube.vm.qemu_command import Platform, kvm_flags
from cube.vm.seam import MachineSpec

PROBE_MARK: Final = b"cube-agent: probe-ok"
_DEADLINES: Final[Mapping[str, float]] = {"kvm": 10, "tcg": 90}  # seconds
_KVM: Final = Path("/dev/kvm")


async def choose_platform(cache: Path, files: GuestFiles) -> Platform:
    """The first of microvm and q35 (virt on arm64), under KVM and then emulated, that truly boots
    this guest. Remembered in `cache` until the host boots anew, or QEMU or the guest change.

    Raises Unsupported without QEMU, and BootFailed with the last attempt's console.
    """
    program = emulator()
    key = "\n".join(
        (
            _host_boot(),
            await emulator_version(program),
            str(files.kernel),
            str(files.kernel.stat().st_mtime_ns),
            str(kvm_may_work()),
        )
    )
    record = cache / "platform.json"
    known = _recall(record, key)
    if known is not None:
        return Platform(program, *known)
    words: list[str] = []
    for machine, accelerator in _candidates(program):
        platform = Platform(program, machine, accelerator)
        words = await _boots(platform, files)
        if not words:
            fresh = record.with_name(f"{record.name}.{os.getpid()}")
            fresh.write_text(
                json.dumps({"key": key, "machine": machine, "accelerator": accelerator})
            )
            fresh.replace(record)
            return platform
    raise BootFailed(
        "no kind of machine boots on this host",
        console=words,
        remedy="use `cubecache mount` instead, or give another kernel",
    )


def _candidates(program: Path) -> list[tuple[str, str]]:
    machines = ["virt"] if program.name.endswith("aarch64") else ["microvm", "q35"]
    accelerators = ["kvm", "tcg"] if kvm_may_work() else ["tcg"]
    return [(machine, accelerator) for accelerator in accelerators for machine in machines]


def kvm_may_work() -> bool:
    """Whether trying KVM makes sense: only booting a machine proves it."""
    # A host can offer /dev/kvm that runs nothing; without the processor's flags none can.
    return os.access(_KVM, os.R_OK | os.W_OK) and kvm_flags(Path("/proc/cpuinfo").read_text())


def _host_boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else "unknown"


def _recall(record: Path, key: str) -> tuple[str, str] | None:
    try:
        known = json.loads(record.read_text())
        if known["key"] == key:
            return str(known["machine"]), str(known["accelerator"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


async def _boots(platform: Platform, files: GuestFiles) -> list[str]:
    """Empty if a probe machine came to its agent, else its last words."""
    with tempfile.TemporaryDirectory(prefix="cubecache-probe-") as name:
        spec = MachineSpec(
            name="probe",
            kernel=files.kernel,
            initrd=files.initrd,
            disks=(),
            directory=Path(name),
            tsc_khz=files.tsc_khz,
            kernel_arguments=("cube.probe",),
        )
        machine = await QemuDriver(platform).start(spec)
        try:
            await asyncio.wait_for(machine.wait(), _DEADLINES[platform.accelerator])
        except TimeoutError:
            return [
                *machine.last_words(),
                f"{platform.machine} under {platform.accelerator} did not boot in time",
            ]
        finally:
            await machine.stop()
        return [] if machine.console.contains(PROBE_MARK) else machine.last_words() or ["silence"]
