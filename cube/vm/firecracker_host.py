"""Whether this host can run Firecracker, found out by booting a machine, and with which options.

Environment: CUBECACHE_FIRECRACKER is the program (else `firecracker` in PATH); CUBECACHE_JAILER is
`UID:GID` or `UID:GID:DIRECTORY`, and then the program `jailer` beside it jails every machine;
CUBECACHE_JAILER_CGROUPS has `FILE=VALUE` words (version 2), CUBECACHE_JAILER_NETNS a path.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cube.errors import BootFailed
from cube.guest.assets import GuestFiles
from cube.vm.bridge import storage_daemon
from cube.vm.firecracker import FirecrackerDriver
from cube.vm.jailer import Jailer
from cube.vm.platform import PROBE_MARK, kvm_may_work
from cube.vm.seam import MachineSpec
from imagecache.errors import Unsupported, UsageError

_REMEDY: Final = "use --driver qemu"
_JAIL = re.compile(r"(\d{1,9}):(\d{1,9})(?::(/.*))?", re.ASCII)


def find_firecracker(environment: Mapping[str, str]) -> Path:
    """The program; raises Unsupported."""
    chosen = environment.get("CUBECACHE_FIRECRACKER", "firecracker")
    found = shutil.which(chosen, path=environment.get("PATH"))
    if found is None:
        raise Unsupported(
            f"this host has no Firecracker ({chosen})",
            remedy=f"install a release of it and name it in CUBECACHE_FIRECRACKER, or {_REMEDY}",
        )
    return Path(found).absolute()


def find_jailer(environment: Mapping[str, str], program: Path) -> Jailer | None:
    """How machines are to be jailed; raises UsageError naming the variable, Unsupported, Denied."""
    wanted = environment.get("CUBECACHE_JAILER", "")
    if not wanted:
        return None
    match = _JAIL.fullmatch(wanted)
    if match is None:
        raise UsageError(f"CUBECACHE_JAILER={wanted!r} is not UID:GID or UID:GID:DIRECTORY")
    jailer = program.with_name("jailer")
    if not jailer.is_file():
        raise Unsupported(f"there is no {jailer}", remedy="install the jailer beside Firecracker")
    cgroups: dict[str, str] = {}
    for word in environment.get("CUBECACHE_JAILER_CGROUPS", "").split():
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"CUBECACHE_JAILER_CGROUPS: {word!r} is not FILE=VALUE")
        cgroups[name] = value
    netns = environment.get("CUBECACHE_JAILER_NETNS", "")
    made = Jailer(
        program=jailer,
        uid=int(match[1]),
        gid=int(match[2]),
        chroot_base=Path(match[3] or "/srv/jailer"),
        cgroups=cgroups,
        netns=Path(netns) if netns else None,
    )
    made.check()
    return made


async def choose_firecracker(
    cache: Path, files: GuestFiles, environment: Mapping[str, str]
) -> FirecrackerDriver:
    """A driver whose machines boot here; raises Unsupported saying what is missing, UsageError."""
    program = find_firecracker(environment)
    if not kvm_may_work():
        raise Unsupported(
            "Firecracker needs KVM, and this host has none that can work: /dev/kvm cannot be "
            "opened, or the processor shows neither vmx nor svm",
            remedy=_REMEDY,
        )
    storage_daemon()
    await _boot_once(FirecrackerDriver(program, cache), files)
    return FirecrackerDriver(program, cache, jailer=find_jailer(environment, program))


async def _boot_once(driver: FirecrackerDriver, files: GuestFiles) -> None:
    with tempfile.TemporaryDirectory(prefix="cubecache-probe-") as name:
        spec = MachineSpec(
            name="probe",
            kernel=files.kernel,
            initrd=files.initrd,
            disks=(),
            directory=Path(name),
            kernel_arguments=("cube.probe",),
        )
        try:
            machine = await driver.start(spec)
        except BootFailed as error:
            # The probe's guest says its word and resets before it listens.
            if any(PROBE_MARK.decode() in line for line in error.console):
                return
            raise Unsupported(
                f"Firecracker boots no machine on this host: {error}", remedy=_REMEDY
            ) from error
        await machine.stop()
